"""The data phase of sft_train.py: from rows in a file to tokens, its CPU time and its memory.

    python experiments/benchmarks/bench_sft_data.py --rows 100000
    python experiments/benchmarks/bench_sft_data.py --data twix.jsonl --ratios 1 --other ../before

Random Russian-like rows of about 1 KB, or those of --data. Each case runs in a process of its own: CPU seconds, those
of its children included, and the peak of its memory above a process that has only imported the libraries. --other
names another checkout of this project that runs interleaved: ratios to it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

CASE = """
import os, resource, sys
import torch, datasets, transformers
from llm_alignment import encoder as encoders, twix
tokenizer = transformers.AutoTokenizer.from_pretrained("experiments/demo/model")
encoder = encoders.ChatEncoder(tokenizer, thinking=False, assistant_only=False)
bare = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = sum(os.times()[:4])
selection, examples = twix.load_data(twix.RowChoice(sys.argv[1], "both", float(sys.argv[2])), encoder)
rows = [twix.tokenise(examples("train"), encoder, 4, longest=1024, lazily="--streaming" in sys.argv)]
rows.append(twix.tokenise(examples("validation"), encoder, 4, longest=1024))
seconds = sum(os.times()[:4]) - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - bare
print(seconds, peak / 1024, selection.sha256[:8])
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = " (default: %(default)s)"
    parser.add_argument("--rows", type=int, default=100_000, help="random rows" + default)
    parser.add_argument("--data", help="file of {messages, subset} rows instead")
    parser.add_argument("--ratios", nargs="+", default=["0.25", "1.0"], help="values of --sample_ratio" + default)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each case" + default)
    parser.add_argument("--other", help="another checkout to compare with")
    return parser


def write_random_rows(path: Path, count: int) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("абвгдежзиклмнопрст", k=rng.randint(2, 9))) for _ in range(5000)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            texts = [" ".join(rng.choices(words, k=rng.randint(5, longest))) for longest in (30, 120)]
            roles = [("user", f"{number} {texts[0]}"), ("assistant", texts[1])]
            messages = [{"role": role, "content": text} for role, text in roles]
            row = {"messages": messages, "subset": rng.choice(["general"] * 4 + ["reasoning"])}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def measure(checkout: str | Path, argv: list[str]) -> tuple[float, float, str]:
    """CPU seconds, MiB above the bare process, and the data's fingerprint."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", CASE, *argv]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, encoding="utf-8", check=True)
    seconds, peak, sha256 = done.stdout.split()[-3:]
    return float(seconds), float(peak), sha256


def main(argv: list[str] | None = None) -> None:
    options = build_parser().parse_args(argv)
    checkouts = [ROOT, *([Path(options.other).resolve()] if options.other else [])]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(options.data or Path(folder) / "rows.jsonl").resolve()
        if not options.data:
            write_random_rows(data, options.rows)
        size = data.stat().st_size / 2**20
        print(f"{data.name}: {size:.0f} MiB")
        for ratio in options.ratios:
            for more in ([], ["--streaming"]):
                case = [str(data), ratio, *more]
                runs = [[measure(checkout, case) for checkout in checkouts] for _ in range(options.rounds)]
                shown = [f"--sample_ratio {' '.join([ratio, *more]):16}"]
                for results in zip(*runs, strict=True):
                    seconds, peak = (statistics.median(values) for values in list(zip(*results, strict=True))[:2])
                    shown.append(f"{seconds:6.1f} s CPU, {peak:5.0f} MiB ({peak / size:.2f} x the file)")
                if options.other:
                    pairs = [(ours[0] / other[0], ours[1] / other[1]) for ours, other in runs]
                    ratios = map(statistics.median, zip(*pairs, strict=True))
                    shown.append("ratios {:.2f} and {:.2f}".format(*ratios))
                    assert len({result[2] for pair in runs for result in pair}) == 1, "other rows were chosen"
                print(" | ".join(shown), flush=True)


if __name__ == "__main__":
    main()
