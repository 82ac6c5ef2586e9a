"""S²-Attn over ranks of torch.distributed. The cases that need processes are in context_parallel_worker.py, which is started once
for each number of ranks."""
import json
import os
import subprocess
import sys
from pathlib import Path

import context_parallel_worker as worker
import pytest
import torch

from longlora.torch import context_parallel as cp

HERE = Path(__file__).resolve().parent
REPORTS = {}


def report(world, directory):
    """Case -> what went wrong on each rank."""
    if world not in REPORTS:
        path = os.pathsep.join([str(HERE), os.environ["PYTHONPATH"]])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(HERE / "context_parallel_worker.py")]
        ranks = [subprocess.Popen([*command, str(rank), str(world), str(directory)], env=env, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True) for rank in range(world)]
        try:
            printed = [process.communicate(timeout=240)[0] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        assert [process.returncode for process in ranks] == [0] * world, "\n".join(printed)
        REPORTS[world] = [json.loads((directory / f"{rank}.json").read_text()) for rank in range(world)]
    return REPORTS[world]


@pytest.mark.parametrize("world,case", [(world, case) for world in (2, 3, 4) for case in worker.case_names(world)])
def test_ranks(world, case, tmp_path_factory):
    for rank, cases in enumerate(report(world, tmp_path_factory.mktemp("ranks"))):
        assert not cases[case], f"rank {rank}:\n{cases[case]}"


# ---- without processes ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("length,ranks,multiple", [(0, 3, 1), (1, 3, 1), (23, 4, 1), (64, 4, 16), (65, 4, 16), (7, 4, 16),
                                                   (80, 3, 16)])
def test_pieces(length, ranks, multiple):
    sizes = cp.pieces(length, ranks, multiple)
    assert len(sizes) == ranks and sum(sizes) == length
    begins = [sum(sizes[:r]) for r in range(ranks)]
    assert all(a % multiple == 0 for a, n in zip(begins, sizes) if n)
    assert max(sizes) - min(sizes) <= 2 * multiple - 1


def test_pieces_refuses():
    for arguments in ((-1, 2), (4, 0), (4, 2, 0)):
        with pytest.raises(ValueError, match="pieces: wanted"):
            cp.pieces(*arguments)


def test_next_tokens():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert cp.next_tokens(ids).tolist() == [[2, 3, -100], [5, 6, -100]]
    assert cp.next_tokens(ids, dim=0, ignore_index=-1).tolist() == [[4, 5, 6], [-1, -1, -1]]
    assert cp.next_tokens(ids[:, :0]).shape == (2, 0)


def test_what_is_sent_does_not_grow_with_the_length_or_the_ranks():
    for tokens, ranks in ((2**13, 1), (2**13, 2), (2**14, 32), (2**16, 1024)):
        sent = cp.exchange([tokens] * ranks, 2**13, 32, 8, 128, 2)
        assert sent == {(r, r + 1): 2 * 2**12 * 4 * 128 * 2 for r in range(ranks - 1)}


def test_the_table_of_the_docs_is_the_one_that_is_computed():
    assert cp.table() in (HERE.parent / "docs/context_parallel.md").read_text()


def test_the_peers_formulas():
    """Step by step for four ranks: what ring attention and all-to-all send for one layer, forward and backward."""
    L, N, H, K, D = 4096, 4, 8, 4, 16
    piece = L // N * D * 2
    ring = (N - 1) * 2 * K * piece + (N - 1) * 2 * K * piece + N * 2 * K * piece
    assert cp.ring_bytes(L, N, K, D, 2) == ring
    assert cp.all_to_all_bytes(L, N, H, K, D, 2) == 2 * (H + K + K + H) * piece * (N - 1) // N
    assert cp.all_to_all_bytes(L, 16, H, K, D, 2) is None
