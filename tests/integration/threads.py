"""A step of the quickstart under several ways to wait for threads, on a quiet machine and beside a busy process.

    python -m tests.integration.threads [--rounds 3] [--batch-size 32 --img-size 32]

The ways take turns; each step time is the median of a process's steps, each row the median of its rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

WAYS: dict[str, dict[str, str]] = {
    "torch's default": {},
    "passive waits": {"OMP_WAIT_POLICY": "PASSIVE"},
    "passive waits, threads bound to cores": {"OMP_WAIT_POLICY": "PASSIVE", "OMP_PROC_BIND": "true"},
    "short spins": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
STEPS = 4
STEP = """
import statistics, sys, time
import timm, torch
import revnets
batch, size, steps = map(int, sys.argv[1:])
stem = 2 if size < 64 else 4
model = timm.create_model("revbifpn_s0", num_classes=10, mode="reversible", stem_stride=stem).train()
model = model.to(memory_format=torch.channels_last)
images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
target = torch.randint(10, (batch,))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
taken = []
for _ in range(steps + 1):
    start = time.perf_counter()
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(images), target).backward()
    optimizer.step()
    taken.append(time.perf_counter() - start)
print(statistics.median(taken[1:]))
"""


def step_time(way: dict[str, str], batch: int, size: int) -> float:
    """Seconds per step, of a process of its own."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", STEP, str(batch), str(size), str(STEPS)],
        env={**plain, **way},
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--img-size", type=int, default=32)
    asked = parser.parse_args()
    found: dict[tuple[str, bool], list[float]] = {}
    for _ in range(asked.rounds):
        for busy in (False, True):
            other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
            try:
                for name, way in WAYS.items():
                    found.setdefault((name, busy), []).append(step_time(way, asked.batch_size, asked.img_size))
            finally:
                if other is not None:
                    other.kill()
                    other.wait()
    print(f"| waiting | quiet, s per step | beside a busy process |  ({os.cpu_count()} cores)")
    for name in WAYS:
        quiet, busy_ = (statistics.median(found[name, busy]) for busy in (False, True))
        print(f"| {name} | {quiet:.2f} | {busy_:.2f} |")


if __name__ == "__main__":
    main()
