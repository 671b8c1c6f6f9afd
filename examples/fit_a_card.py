"""Says, before a GPU is rented, which batch of a training step fits its memory: nothing is allocated, no GPU is needed.

python examples/fit_a_card.py revbifpn_s3@288 24GB
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import revnets  # noqa: F401 - registers revbifpn_s0 to _s6 with timm
from revnets.profiling.fit import DoesNotFitError, fit, parse_budget
from revnets.profiling.target import Setting, parse_targets


def main(argv: Sequence[str] | None = None) -> dict[str, int]:
    """Prints the largest batch in each memory mode, and returns them; 0 where not one image fits."""
    line = argparse.ArgumentParser(description="The largest batch that fits a card, predicted.")
    line.add_argument("network", nargs="?", default="revbifpn_s3@288", help="NAME@SIZE, any network of timm")
    line.add_argument("memory", nargs="?", default="24GB", help="of the card, less what the driver takes")
    line.add_argument("--device", default="cuda", help="to predict for; it need not be here")
    args = line.parse_args(argv)

    budget = parse_budget(args.memory)
    setting = Setting(device=args.device, amp_dtype="bfloat16", optimizer="adamw")
    batches = {}
    for target in parse_targets(args.network, setting):
        try:
            found = fit(target, setting, budget)
        except DoesNotFitError as refusal:
            print(refusal)
            batches[target.mode_name] = 0
            continue
        batches[target.mode_name] = found.target.batch_size
        peak = found.predicted.peak_bytes
        print(f"{target.mode_name}: batch {found.target.batch_size}, {peak / 1e9:.2f} of {budget / 1e9:.2f} GB")
    return batches


if __name__ == "__main__":
    main()
