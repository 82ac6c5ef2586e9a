"""One process of the groups in test_torch_groups.py: longlora.torch.train with the command line's arguments.

accelerate shards only over processes that have a GPU each, so this one claims to have one. FSDP2 and
DeepSpeed themselves then run on the CPU over gloo.
"""

import os

from accelerate.state import DistributedType, PartialState

from longlora.torch.train import leave, main

start = PartialState.__init__


def as_if_on_a_gpu(self, *args, **kwargs):
    start(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        self.distributed_type = DistributedType.DEEPSPEED if deepspeed else DistributedType.MULTI_GPU


PartialState.__init__ = as_if_on_a_gpu

if __name__ == "__main__":
    leave(main())
