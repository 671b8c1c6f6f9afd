"""Faults of models: RevBiFPN and the transformers, and what timm expects of them."""

from .fault import Fault

FAULTS = (
    Fault(
        "widened-mode",
        "revnets/models/revbifpn.py",
        old='"global_pool": self.global_pool.pool_type, "mode": self.mode}',
        new='"global_pool": self.global_pool.pool_type}',
        tests=("tests/layers/test_convert.py",),
    ),
    Fault(
        "new-scale-drop-path",
        "revnets/models/_revbifpn_parts.py",
        old="drop_path_rate=0.0 if j == num_inputs else drop_path,",
        new="drop_path_rate=drop_path,",
        tests=("tests/models/test_timm_contract.py",),
    ),
    Fault(
        "group-matcher-coarse",
        "revnets/models/revbifpn.py",
        old="((index - first) // per_stage if coarse else index - first,)",
        new="(index - first,)",
        tests=("tests/models/test_timm_contract.py",),
    ),
    Fault(
        "reset-classifier-dtype",
        "revnets/models/revbifpn.py",
        old="        self.classifier.to(device=like.device, dtype=like.dtype).train(self.training)\n",
        new="        self.classifier.train(self.training)\n",
        tests=("tests/models/test_timm_heads.py",),
    ),
    Fault(
        "prune-down-branches",
        "revnets/models/revbifpn.py",
        old="(silo.down, set(range(min(take), NUM_SCALES)))",
        new="(silo.down, set(range(NUM_SCALES)))",
        tests=("tests/models/test_timm_heads.py",),
    ),
    Fault(
        "checkpoint-left-over",
        "revnets/models/_revbifpn_checkpoint.py",
        old='extra = [key for key in theirs if key.startswith("body.") and _op(key) not in ops]',
        new="extra: list[str] = []",
        tests=("tests/models/test_pretrained.py",),
    ),
    Fault(
        "stem-repeats",
        "revnets/models/_revbifpn_parts.py",
        old="if in_chans <= repeated and repeated * stride**2 == out_chans:",
        new="if in_chans < repeated and repeated * stride**2 == out_chans:",
        tests=("tests/models/test_timm_contract.py",),
    ),
    Fault(
        "mus-vit-patches",
        "revnets/models/_mus_vit_parts.py",
        old="        if not isinstance(self.proj, MuSConv2d):",
        new="        if isinstance(self.proj, MuSConv2d):",
        tests=("tests/models/test_mus_vit.py",),
    ),
)
