"""Builds, tests and measures longlora on a machine with a GPU.

    python benchmarks/gpu_check.py [--out FOLDER] [--only PART ...] [--skip PART ...]

The parts build the package into a folder of its own, run the op tests on the GPU, run compute-sanitizer on
small shapes, compare a short training with the CPU's, and run the tests of longlora.torch and the benchmarks.
They need Python, NumPy, setuptools and nvcc, and no network. Tests also need pytest, ml_dtypes and
hypothesis. The last two kinds also need torch; some tests of longlora.torch need transformers and peft too.

Each part has its own time limit, and --limit bounds the sum. If a part fails, the results of earlier parts
remain. FOLDER receives rows.jsonl (a JSON object for each part and each measurement), report.md, and the
output of each part.
"""

import argparse
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OP_TESTS = (
    "cast",
    "matmul",
    "embedding",
    "rms_norm",
    "rope_op",
    "lora_linear",
    "s2_attention",
    "cached_attention",
    "swiglu",
    "linear_cross_entropy",
    "adamw",
    "cuda_views",
    "cuda_binding",
    "cuda_streams",
    "cuda_generate",
)
# The last two skip themselves without transformers and peft.
TORCH_TESTS = ("torch_ops", "torch_transformers", "torch_extend")
# name -> time limit in seconds
BENCHMARKS = {
    "elementwise": 40,
    "host": 20,
    "gemm": 30,
    "lora_linear": 40,
    "s2_attention": 60,
    "linear_cross_entropy": 40,
    "train_step": 150,
}
PARTS = ("build", "tests", "memcheck", "racecheck", "training", "torch", *BENCHMARKS)


class Check:
    """A run: the folder of its files, the environment that finds the package, and facts about the GPU."""

    def __init__(self, options):
        self.options, self.out = options, Path(options.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.rows, self.deadline = [], time.monotonic() + options.limit
        (self.out / "rows.jsonl").write_text("")
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        self.cwd = ROOT
        self.about = {
            "commit": self.says("git", "describe", "--always", "--dirty"),
            "python": sys.version.split()[0],
            "driver": None,
            "gpu": None,
            "clocks": None,
            "why_not": None,
        }

    def says(self, *command):
        """The output of a short command, or None if it fails."""
        try:
            done = subprocess.run(
                command, cwd=self.cwd, env=self.env, capture_output=True, text=True, timeout=120
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() or None if done.returncode == 0 else None

    def use(self, folder):
        """Test the package in `folder` instead of the one in the source tree."""
        self.env["PYTHONPATH"], self.env["PYTHONSAFEPATH"] = os.pathsep.join([str(folder), str(ROOT)]), "1"

    def use_installed(self):
        text = "import os, longlora; print(os.path.dirname(os.path.dirname(longlora.__file__)))"
        where = subprocess.run(
            [sys.executable, "-c", text],
            cwd=self.out,
            env=os.environ | {"PYTHONSAFEPATH": "1"},
            capture_output=True,
            text=True,
        )
        if where.returncode:
            sys.exit("gpu_check: --installed: longlora is not installed")
        self.use(where.stdout.strip())

    def look(self):
        """Find out the name, driver and clocks of the GPU, or why there is none."""
        text = (
            "import json; from longlora import cuda; ok = cuda.is_available()\n"
            "print(json.dumps({'gpu': cuda.properties(0) if ok else None, "
            "'why_not': None if ok else 'no GPU: ' + cuda.reason(), "
            "'cuda': cuda.versions(), 'built_for': cuda.built_for()}))"
        )
        said = self.says(sys.executable, "-c", text)
        self.about.update(
            json.loads(said.splitlines()[-1]) if said else {"why_not": "the package cannot be imported"}
        )
        smi = self.says(
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu",
            "--format=csv,noheader",
            "--id=0",
        )
        if smi:
            driver, *clocks = [value.strip() for value in smi.split(",")]
            self.about.update(
                driver=driver,
                clocks=dict(zip(("sm", "sm_max", "memory", "power_limit", "temperature"), clocks)),
            )

    def part(self, name, limit, command, why=None, wants_gpu=True, parse=None):
        """Run a wanted part -> whether it succeeded. parse(output) makes its words in the report."""
        if name not in self.options.parts:
            return False
        left = self.deadline - time.monotonic()
        limit = min(limit, left)
        if wants_gpu and self.about["why_not"]:
            why = self.about["why_not"]
        elif left < 5:
            why = f"the {self.options.limit} seconds of --limit are over"
        if why:
            return self.note(name, "skipped", why, 0)
        print(f"{name}: at most {limit:.0f} s", flush=True)
        start, log = time.monotonic(), self.out / f"{name}.txt"
        with open(log, "w") as file:
            process = subprocess.Popen(
                command,
                cwd=self.cwd,
                env=self.env,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        output = log.read_text(errors="replace")
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
        result = "ok" if code == 0 else "out of time" if code is None else "failed"
        return self.note(name, result, (parse(output) if parse else None) or last, time.monotonic() - start)

    def note(self, name, result, words, seconds):
        self.add({"part": name, "result": result, "words": words[:300], "seconds": round(seconds, 1)})
        print(f"  {name}: {result}, {seconds:.0f} s: {words[:160]}", flush=True)
        return result == "ok"

    def add(self, *rows):
        """Write the rows to the files at once, so that they survive a later failure."""
        self.rows += rows
        with open(self.out / "rows.jsonl", "a") as file:
            file.writelines(
                json.dumps({**row, **({"about": self.about} if "part" in row else {})}) + "\n" for row in rows
            )
        (self.out / "report.md").write_text(self.report())

    def report(self):
        about, clocks = self.about, self.about["clocks"] or {}
        gpu = about["gpu"]["name"] if about["gpu"] else about["why_not"] or "not examined yet"
        lines = [
            f"# {gpu}",
            "",
            f"Commit {about['commit']}, driver {about['driver']}, clocks "
            + (", ".join(f"{key} {value}" for key, value in clocks.items()) or "unknown")
            + f", Python {about['python']}, "
            f"built for {about.get('built_for')}, {time.strftime('%Y-%m-%d')}.",
            "",
            "| part | result | seconds | |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {row['part']} | {row['result']} | {row['seconds']} | {row['words'].replace('|', '/')} |"
            for row in self.rows
            if "part" in row
        ]
        measured = [row for row in self.rows if "benchmark" in row]
        if measured:
            sys.path.insert(0, str(ROOT))
            from benchmarks.table import targets

            lines += ["", *targets(measured)]
        return "\n".join(lines) + "\n"


def build(check, target):
    """Build the package into `target`.

    It is built for this machine's GPU only, unless LONGLORA_CUDA_ARCH is set: a build for all GPUs takes
    minutes on a few processors.
    """
    sm = check.says("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0")
    if sm and "LONGLORA_CUDA_ARCH" not in os.environ:
        sm = sm.replace(".", "")
        check.env["LONGLORA_CUDA_ARCH"] = {"90": "90a"}.get(sm, sm)
    check.env["LONGLORA_CUDA"] = os.environ.get("LONGLORA_CUDA", "1")
    command = [
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-q",
        "--target",
        str(target),
        ".",
    ]
    if not has(check, "pip"):
        command = ["setup.py", "build", "--build-lib", str(target)]
    if check.part("build", 360, [sys.executable, *command], wants_gpu=False):
        check.use(target)
    else:
        check.about["why_not"] = "the build failed"


@functools.cache
def has(check, module):
    return check.says(sys.executable, "-c", f"import {module}; print(1)") is not None


def lacks(check, *modules):
    """A sentence that names the first missing module, or None."""
    return next((f"{module} is not installed" for module in modules if not has(check, module)), None)


def pytest(names):
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-k",
        "cuda",
        "-p",
        "no:cacheprovider",
        "--maxfail",
        "20",
        *(str(next((ROOT / "tests").rglob(f"test_{name}.py"))) for name in names),
    ]


def told(output):
    """The summary line of pytest; if pytest was killed before it, the number of finished tests."""
    last, dots = output.strip().rpartition("\n")[2], "".join(re.findall(r"^[.sFEx]+(?= |$)", output, re.M))
    return f"ended after {len(dots)} tests" if dots and not re.search(r" in [\d.]+s", last) else last


def sanitizer():
    """The path of compute-sanitizer, or None. It is searched where setup.py searches nvcc."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [
        "compute-sanitizer",
        *(os.path.join(home, "bin", "compute-sanitizer") for home in homes if home),
    ]
    return next(filter(None, map(shutil.which, places)), None)


def parse(argv):
    """The options. `parts` lists the parts to run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="gpu-check", help="folder for the results [%(default)s]")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        metavar="PART",
        help="run only these: " + " ".join(PARTS),
    )
    parser.add_argument(
        "--skip", nargs="+", choices=PARTS, default=(), metavar="PART", help="leave these out"
    )
    parser.add_argument("--installed", action="store_true", help="test the installed package, do not build")
    parser.add_argument(
        "--smoke", action="store_true", help="check that everything runs, on small shapes; needs no torch"
    )
    parser.add_argument("--limit", type=float, default=590, help="time limit in seconds [%(default)s]")
    options = parser.parse_args(argv)
    options.parts = [part for part in options.only if part not in options.skip]
    return options


def main(argv=None):
    options = parse(argv)
    check = Check(options)
    with tempfile.TemporaryDirectory() as folder:
        if options.installed:
            check.use_installed()
        elif "build" in options.parts:
            build(check, Path(folder) / "package")
        if not check.about["why_not"]:
            check.look()
        ours = [sys.executable, "-m", "benchmarks.gpu_small"]
        untested = lacks(check, "pytest", "ml_dtypes", "hypothesis")
        if untested:
            check.part(
                "tests",
                60,
                ours,
                parse=lambda output: (
                    f"{untested}; compared each op once with the CPU: " + output.strip().rpartition("\n")[2]
                ),
            )
        else:
            check.part("tests", 180, pytest(OP_TESTS), parse=told)
        watcher = sanitizer()
        # Libraries probe driver functions that may fail; these are not errors. Ours raise when they fail.
        for tool, how in (("memcheck", ("--report-api-errors", "no")), ("racecheck", ())):
            check.part(
                tool,
                75,
                [watcher, "--tool", tool, *how, "--error-exitcode", "9", *ours],
                why=None if watcher else "compute-sanitizer was not found",
            )
        smoke = ["--smoke"] * options.smoke
        check.part("training", 60, [sys.executable, "-m", "benchmarks.gpu_small", "--training", *smoke])
        if "torch" in options.parts and not check.about["why_not"]:
            untested = lacks(check, "torch") or untested
            if (
                not untested
                and check.says(sys.executable, "-c", "import torch; print(torch.cuda.is_available())")
                != "True"
            ):
                untested = "torch sees no GPU"
        check.part("torch", 120, pytest(TORCH_TESTS), why=untested, parse=told)
        measured = Path(folder) / "measured.jsonl"
        for name, limit in BENCHMARKS.items():
            measured.write_text("")
            command = [
                sys.executable,
                "-m",
                f"benchmarks.bench_{name}",
                "--device",
                "cuda",
                "--seconds",
                "0.3",
                "--json",
                str(measured),
                *smoke,
            ]
            check.part(
                name, limit, command, why=None if check.about["why_not"] or smoke else lacks(check, "torch")
            )
            check.add(*(json.loads(line) for line in measured.read_text().splitlines()))
    print(f"\n{check.out / 'report.md'}:\n\n{check.report()}")
    return 0 if all(row["result"] in ("ok", "skipped") for row in check.rows if "part" in row) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
