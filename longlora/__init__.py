"""LongLoRA (arXiv 2309.12307): extend the context of a pretrained decoder on one machine."""
from . import ops
from ._C import get_num_threads, set_num_threads

__version__ = "0.1.0"
