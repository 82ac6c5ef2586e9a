"""python -m longlora, and the command longlora"""

import sys

from longlora.interrupt import end_quietly


def main() -> int:
    """Run the command line of the process -> the exit code."""
    end_quietly()
    from longlora import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
