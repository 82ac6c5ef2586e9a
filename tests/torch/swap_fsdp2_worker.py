"""One of two processes over gloo, for test_torch_groups.py: a swapped and extended model under FSDP2.

Arguments: rank, directory. Prints JSON: the losses of the group and of one process that is not swapped, how
far apart their adapters are, and whether logits were made.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
import transformers
from peft import get_peft_model_state_dict
from torch.distributed.fsdp import fully_shard

import longlora.torch

STEPS = 4


def model(tied):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    made = longlora.torch.extend(transformers.AutoModelForCausalLM.from_config(config), 512, group_size=6)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_B" in name:  # else they are zero, and so are A's gradients
                p.add_(torch.randn_like(p) * 0.1)
    return made.train()


def train(made, rows):
    """-> the losses of STEPS steps, and whether any of them made logits."""
    optimizer, losses = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], 1e-2), []
    logits = False
    for step in range(STEPS):
        ids = torch.randint(3, 61, (2, 24), generator=torch.Generator().manual_seed(step))[rows]
        output = made(input_ids=ids, labels=ids, use_cache=False)
        logits = logits or output.logits is not None
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.detach())
    return torch.stack(losses), logits


def shard(made, tied):
    """As accelerate does: layers, and an untied head with the last norm, are units of their own."""
    base = made.get_base_model()
    for layer in base.model.layers:
        fully_shard(layer)
    if not tied:
        fully_shard([base.model.norm, base.lm_head])
    fully_shard(made)


def main(rank, directory):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/init", rank=rank, world_size=2)
    report = []
    for tied in (False, True):
        alone = model(tied)
        want, adapter = train(alone, slice(2))[0], get_peft_model_state_dict(alone)
        for order in ("before", "after", "undone"):
            made = model(tied)
            if order != "after":
                longlora.torch.swap(made)
            shard(made, tied)
            if order == "after":
                longlora.torch.swap(made)
            if order == "undone":
                longlora.torch.unswap(made)
            losses, logits = train(made, slice(rank, rank + 1))
            dist.all_reduce(losses)
            found = {name: x.full_tensor() for name, x in get_peft_model_state_dict(made).items()}
            again = longlora.torch.swap(longlora.torch.unswap(made))
            report.append(
                {
                    "case": f"tied {tied}, swapped {order}",
                    "counts": again,
                    "losses": (losses / 2).tolist(),
                    "alone": want.tolist(),
                    "logits": logits,
                    "wants_logits": order == "undone",
                    "names": sorted(found),
                    "wanted": sorted(adapter),
                    "numbers": min(x.numel() for x in found.values()),
                    "apart": max(((found[n] - x).norm() / x.norm()).item() for n, x in adapter.items()),
                }
            )
            longlora.torch.unswap(made)
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    os._exit(0)  # as longlora.torch.train.leave
