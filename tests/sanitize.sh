#!/usr/bin/env bash
# The op tests on a build with the address and undefined-behaviour sanitizers, made in a temporary directory: nothing of the
# tree or of an installed package is touched. Needs what `pip install '.[test]'` installs, and gcc. Arguments go to pytest.
#
#     tests/sanitize.sh [-k NAME ...]
#     WIDE=1 tests/sanitize.sh -k portable      # the sizes of AVX-512
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/lib"
cp -r longlora "$work/lib/"
rm -f "$work"/lib/longlora/_C*.so # of a build in the tree, without sanitizers
LONGLORA_CUDA=0 SANITIZE=address,undefined CC=gcc python setup.py -q build_ext --build-temp "$work/temp" --build-lib "$work/lib"
cp -r tests "$work/"
ops=$(python - <<'PY'
import glob, re
stems = {re.sub("_(forward|backward)$", "", op) for op in re.findall(r"OP\((\w+),", open("csrc/ops.c").read())}
files = {f"tests/ops/test_{stem}.py" for stem in stems | {"extremes", "rope_op", "threads"}} | {f"tests/binding/test_{name}.py" for name in ("binding", "changed_indices", "dlpack", "recording", "tensor")}
print(*sorted(files & set(glob.glob("tests/*/*.py"))))
PY
)
# Python and torch keep memory to the end, so test_dlpack.py looks for leaks. It needs freed memory to be reused.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=4 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$work/lib" PYTHONMALLOC=malloc
cd "$work"
python -m pytest -q -p no:cacheprovider $ops "$@"
