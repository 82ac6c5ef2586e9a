"""python -m longlora"""

import sys

from longlora.cli import main

sys.exit(main())
