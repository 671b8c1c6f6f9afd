"""Faults of sparsity: masks, their schedules, and the controller that exchanges weights."""

from .fault import Fault

FAULTS = (
    Fault(
        "masks-empty-layer",
        "revnets/sparsity/masks.py",
        old="if counts[most] > some <= sizes[i]:",
        new="if False:",
        tests=("tests/sparsity/test_masks.py",),
    ),
    Fault(
        "masks-remainders",
        "revnets/sparsity/masks.py",
        old="counts = [min(of * math.floor(w / of), n) for w, n, of in zip(wanted, sizes, blocks, strict=True)]",
        new="counts = [min(of * math.ceil(w / of), n) for w, n, of in zip(wanted, sizes, blocks, strict=True)]",
        tests=("tests/sparsity/test_masks.py",),
    ),
    Fault(
        "schedule-last",
        "revnets/sparsity/schedules.py",
        old="self.first < step < self.last",
        new="self.first < step <= self.last",
        tests=("tests/sparsity/test_schedules.py",),
    ),
    Fault(
        "schedule-grow-ties",
        "revnets/sparsity/schedules.py",
        old="masked_fill(kept, -1.0)",
        new="masked_fill(kept, 0.0)",
        tests=("tests/sparsity/test_schedules.py",),
    ),
    Fault(
        "schedule-updates",
        "revnets/sparsity/schedules.py",
        old="max(min(steps, self.last - 1) - self.first, 0)",
        new="max(min(steps, self.last) - self.first, 0)",
        tests=("tests/sparsity/test_schedules.py",),
    ),
    Fault(
        "controller-skipped-gradients",
        "revnets/sparsity/controller.py",
        old="            self._forget_gradients()\n            return None",
        new="            return None",
        tests=("tests/sparsity/test_controller.py",),
    ),
    Fault(
        "controller-regrown-state",
        "revnets/sparsity/controller.py",
        old="self._mask(layer, kept)",
        new="self._mask(layer, layer.mask)",
        tests=("tests/sparsity/test_controller.py",),
    ),
    Fault(
        "controller-tied-gradients",
        "revnets/sparsity/controller.py",
        old="torch.stack(grads).sum(0) if grads",
        new="grads[0] if grads",
        tests=("tests/sparsity/test_controller.py",),
    ),
    Fault(
        "controller-frozen",
        "revnets/sparsity/controller.py",
        old="free = layer.weight.requires_grad and id(layer.weight) in trained",
        new="free = layer.weight.requires_grad",
        tests=("tests/sparsity/test_controller.py",),
    ),
    Fault(
        "found-average",
        "revnets/sparsity/found.py",
        old="module.mask.copy_(source.mask)",
        new="module.mask.logical_and_(source.mask)",
        tests=("tests/sparsity/test_controller.py",),
    ),
    Fault(
        "blocks-of-one-kind",
        "revnets/sparsity/blocks.py",
        old="torch.equal(spread(of_blocks(mask, of), of), mask)",
        new="True",
        tests=("tests/sparsity/test_blocks.py",),
    ),
    Fault(
        "blocks-smallest-number",
        "revnets/sparsity/blocks.py",
        old="torch.linalg.vector_norm(numbers.unflatten(1, (-1, of)), dim=2)",
        new="numbers.unflatten(1, (-1, of)).abs().amin(2)",
        tests=("tests/sparsity/test_blocks.py",),
    ),
    Fault(
        "controller-blocks-kept",
        "revnets/sparsity/controller.py",
        old="if ours.get(name, 1) != theirs.get(name, 1)",
        new="if False",
        tests=("tests/sparsity/test_blocks.py",),
    ),
)
