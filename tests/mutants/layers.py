"""Faults of layers: drop-in layers: munit scaling, FP8, masks, lean norms and convolutions, conversion."""

from .fault import Fault

FAULTS = (
    Fault(
        "mus-stride",
        "revnets/layers/munit/functional.py",
        old="x[:, :, ::down, ::right]",
        new="x[:, :, ::right, ::down]",
        tests=(
            "tests/layers/munit/test_fp8.py",
            "tests/layers/munit/test_functional.py",
        ),
    ),
    Fault(
        "mus-conv-grad-scale",
        "revnets/layers/munit/functional.py",
        old="g if g is None else g.mul_(scale / grad_scale).to(dtype)",
        new="g if g is None else g.mul_(scale).to(dtype)",
        tests=("tests/layers/munit/test_functional.py",),
    ),
    Fault(
        "mus-memory-format",
        "revnets/layers/munit/functional.py",
        old="last = maps and x.stride(1) == 1",
        new="last = False",
        tests=(
            "tests/layers/munit/test_functional.py",
            "tests/layers/munit/test_fp8.py",
        ),
    ),
    Fault(
        "mus-half-gradient",
        "revnets/layers/munit/functional.py",
        old="return 1.0 if dtype == torch.float16 else GRAD_SCALE",
        new="return GRAD_SCALE",
        tests=("tests/layers/munit/test_functional.py",),
    ),
    Fault(
        "fp8-clip-scaled",
        "revnets/layers/munit/fp8.py",
        old="top = torch.finfo(dtype).max / scale",
        new="top = torch.finfo(dtype).max",
        tests=(
            "tests/layers/munit/test_fp8.py",
            "tests/layers/munit/test_functional.py",
        ),
    ),
    Fault(
        "mus-optim-depthwise",
        "revnets/layers/munit/optim.py",
        old='depthwise = own == 1 and getattr(module, "groups", 1) > 1',
        new="depthwise = own == 1",
        tests=("tests/layers/munit/test_optim.py",),
    ),
    Fault(
        "widen-split-attrs",
        "revnets/layers/sparse_ift/widen_rules.py",
        old="    c.note_attributes(op, [part, xs[dim]])\n",
        new="",
        tests=(
            "tests/layers/test_convert.py",
            "tests/layers/sparse_ift/test_members.py",
        ),
    ),
    Fault(
        "widen-grouped",
        "revnets/layers/sparse_ift/widen_rules.py",
        old="        c.widths.divided(out, groups, c.place(op))\n",
        new="",
        tests=(
            "tests/layers/test_convert.py",
            "tests/layers/sparse_ift/test_members.py",
        ),
    ),
    Fault(
        "lean-version-unchecked",
        "revnets/layers/lean/nodes.py",
        old="        if tensor._version != self.version:\n",
        new="        if False:\n",
        tests=("tests/layers/lean/test_network.py",),
    ),
    Fault(
        "lean-shared-in-place",
        "revnets/layers/lean/nodes.py",
        old="not stays and self.readers <= 1\n",
        new="not stays\n",
        tests=("tests/layers/lean/test_network.py",),
    ),
    Fault(
        "norm-act-momentum",
        "revnets/layers/lean/norm_act.py",
        old="        and norm.momentum is not None\n",
        new="",
        tests=("tests/layers/lean/test_lean_layers.py",),
    ),
    Fault(
        "norm-act-relu-at-zero",
        "revnets/layers/lean/activations.py",
        old="threshold_backward(grad, x, 0)",
        new="threshold_backward(grad, x, 1e-3)",
        tests=("tests/layers/lean/test_lean_layers.py",),
    ),
    Fault(
        "conv-dilated",
        "revnets/layers/lean/conv.py",
        old=" or conv.dilation != (1, 1)",
        new="",
        tests=("tests/layers/lean/test_lean_layers.py",),
    ),
    Fault(
        "conv-strides",
        "revnets/layers/lean/conv.py",
        old="found = F.conv2d(maps, kernels, None, 1, conv.padding, conv.stride, len(kernels))",
        new="found = F.conv2d(maps, kernels, None, 1, conv.padding, conv.stride[::-1], len(kernels))",
        tests=("tests/layers/lean/test_lean_layers.py",),
    ),
    Fault(
        "sparse-gathered",
        "revnets/layers/sparse_ift/sparse.py",
        old="if layer.dense_grad is None else layer.dense_grad + gathered",
        new="if layer.dense_grad is None else gathered",
        tests=(
            "tests/layers/sparse_ift/test_sparse.py",
            "tests/sparsity/test_controller.py",
        ),
    ),
    Fault(
        "sparse-load-masked",
        "revnets/layers/sparse_ift/sparse.py",
        old="        self.weight.mul_(self.mask)  # a dense checkpoint",
        new="        self.weight.mul_(1)  # a dense checkpoint",
        tests=("tests/layers/sparse_ift/test_sparse.py",),
    ),
    Fault(
        "fold-groups",
        "revnets/layers/sparse_ift/doped.py",
        old='groups = getattr(u, "groups", 1)',
        new="groups = 1",
        tests=("tests/layers/sparse_ift/test_members.py",),
    ),
    Fault(
        "parallel-shares",
        "revnets/layers/sparse_ift/parallel.py",
        old="kept = block * (pieces // count + (index < pieces % count))",
        new="kept = block * (pieces // count)",
        tests=("tests/layers/sparse_ift/test_members.py",),
    ),
    Fault(
        "compact-dtype",
        "revnets/layers/sparse_ift/compact.py",
        old="torch.zeros(tensor.shape, dtype=values.dtype)",
        new="torch.zeros(tensor.shape)",
        tests=("tests/layers/sparse_ift/test_compact.py",),
    ),
)
