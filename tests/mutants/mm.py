"""Faults of mm: MMDetection's side: frozen parts, operators, hooks, checkpoints."""

from .fault import Fault

FAULTS = (
    Fault(
        "mm-norm-eval",
        "revnets/mm/networks/backbone.py",
        old="or (self.norm_eval and isinstance(module, _BatchNorm))",
        new="or (self.norm_eval and isinstance(module, nn.BatchNorm2d))",
        tests=("tests/mm/networks/test_backbone.py",),
    ),
    Fault(
        "mm-frozen-part",
        "revnets/mm/networks/backbone.py",
        old="(own and all(id(p) in frozen for p in own))",
        new="(own and any(id(p) in frozen for p in own))",
        tests=("tests/mm/networks/test_backbone.py",),
    ),
    Fault(
        "mm-softnms-threshold",
        "revnets/mm/operators/boxes.py",
        old="overlap >= iou_threshold, 1 - overlap",
        new="overlap > iou_threshold, 1 - overlap",
        tests=("tests/mm/operators/test_boxes.py",),
    ),
    Fault(
        "mm-softnms-score",
        "revnets/mm/operators/boxes.py",
        old="left = left[scores[left] >= min_score]",
        new="left = left[scores[left] > min_score]",
        tests=("tests/mm/operators/test_boxes.py",),
    ),
    Fault(
        "mm-iou-offset",
        "revnets/mm/operators/boxes.py",
        old="areas = (boxes[:, 2:] - boxes[:, :2] + offset).prod(1)",
        new="areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)",
        tests=("tests/mm/operators/test_boxes.py",),
    ),
    Fault(
        "mm-deform-strides",
        "revnets/mm/operators/deformable.py",
        old='names = ("dH", "dW", "padH"',
        new='names = ("dW", "dH", "padH"',
        tests=("tests/mm/operators/test_deformable.py",),
    ),
    Fault(
        "mm-focal-background",
        "revnets/mm/operators/losses.py",
        old="factor = (target >= 0).to(softmax.dtype)",
        new="factor = torch.ones_like(target, dtype=softmax.dtype)",
        tests=("tests/mm/operators/test_losses.py",),
    ),
    Fault(
        "mm-outdated-first",
        "revnets/mm/hooks/checkpoint.py",
        old="if self._due and runner.optim_wrapper.should_update():",
        new="if self._due:",
        tests=("tests/mm/hooks/test_checkpoint.py",),
    ),
    Fault(
        "mm-best-again",
        "revnets/mm/hooks/checkpoint.py",
        old="            if path not in best:",
        new="            if True:",
        tests=("tests/mm/hooks/test_checkpoint.py",),
    ),
    Fault(
        "mm-keep-count",
        "revnets/mm/hooks/checkpoint.py",
        old="if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:",
        new="if self.max_keep_ckpts > 0:",
        tests=("tests/mm/hooks/test_checkpoint.py",),
    ),
    Fault(
        "mm-last-group",
        "revnets/mm/hooks/sparsity.py",
        old="steps = -(-runner.max_iters // ",
        new="steps = (runner.max_iters // ",
        tests=("tests/mm/hooks/test_sparsity.py",),
    ),
    Fault(
        "mm-extra-levels",
        "revnets/mm/networks/neck.py",
        old="if len(outs) > self.num_levels and _learns(module)",
        new="if _learns(module)",
        tests=("tests/mm/networks/test_neck.py",),
    ),
    Fault(
        "mm-flops-resumed",
        "revnets/mm/hooks/training_flops.py",
        old='self._steps = runner.iter // getattr(runner.optim_wrapper, "_accumulative_counts", 1)',
        new="self._steps = runner.iter",
        tests=("tests/mm/test_densified.py",),
    ),
)
