"""One process of the groups in test_torch_train.py: longlora.torch.train, with the arguments of the command line.

accelerate shards processes that have a GPU each and no others; where FSDP is asked for, this one says that it has one. All that
follows, FSDP2 itself, runs on the CPU over gloo.
"""
import os
import sys

from accelerate.state import DistributedType, PartialState

from longlora.torch.train import main

if os.environ.get("ACCELERATE_USE_FSDP"):
    start = PartialState.__init__

    def as_if_on_a_gpu(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_if_on_a_gpu

if __name__ == "__main__":
    sys.exit(main())
