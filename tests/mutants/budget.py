"""Faults of budgets: what a traced step is taken for, the integer program, and what blocks do by a plan."""

from .fault import Fault

FIT, CHOICES, BLOCKS = "tests/budget/test_fit.py", "tests/budget/test_choices.py", "tests/budget/test_blocks.py"

FAULTS = (
    Fault(
        "budget-optimizer-peak",
        "revnets/budget/watch.py",
        old="                optimizer = max(optimizer, now)\n",
        new="                optimizer = now\n",
        tests=(BLOCKS, FIT),
    ),
    Fault(
        "budget-hooks-keep",
        "revnets/budget/watch.py",
        old="self.watch.entered(module, args, None), keeps=False)",
        new="self.watch.entered(module, args, None), keeps=True)",
        tests=(BLOCKS, FIT),
    ),
    Fault(
        "budget-backward-place",
        "revnets/budget/watch.py",
        old="backward[place] = max(backward[place], now)",
        new="backward[place] = max(backward[place], before)",
        tests=(BLOCKS, FIT),
    ),
    Fault(
        "budget-run-computed-again",
        "revnets/budget/program.py",
        old='needs[run.last, "backward"] = max(needs.get((run.last, "backward"), 0.0), peak)',
        new='needs[run.last, "backward"] = needs.get((run.last, "backward"), 0.0)',
        tests=(BLOCKS, FIT),
    ),
    Fault(
        "budget-writing-block",
        "revnets/budget/program.py",
        old="self.again is not None and not block.writes",
        new="self.again is not None",
        tests=(BLOCKS, FIT),
    ),
    Fault(
        "budget-handed-on",
        "revnets/budget/program.py",
        old='if c.choice in ("store", "offload") and c.first == self._next(origin)',
        new='if c.choice in ("offload",) and c.first == self._next(origin)',
        tests=(BLOCKS, FIT),
    ),
    Fault(
        "budget-slices-rest",
        "revnets/budget/choices.py",
        old='(*vars(module)["_budget"].slices, (len(children), len(children)))',
        new='vars(module)["_budget"].slices',
        tests=(CHOICES,),
    ),
    Fault(
        "budget-in-evaluation",
        "revnets/budget/choices.py",
        old="if how is None or not self.training or not torch.is_grad_enabled():",
        new="if how is None:",
        tests=(CHOICES, FIT),
    ),
    Fault(
        "budget-given-list",
        "revnets/budget/choices.py",
        old="        leaves = list(self.rest)\n",
        new="        leaves = self.rest\n",
        tests=(CHOICES,),
    ),
    Fault(
        "budget-modes-put-back",
        "revnets/budget/plan.py",
        old="    if before is not None:\n        put_modes(model, before)\n\n    def put_back",
        new="    def put_back",
        tests=(CHOICES, FIT),
    ),
    Fault(
        "budget-reads-under-autocast",
        "revnets/budget/step.py",
        old='self.device.type != "cpu" or self.amp_dtype is not None',
        new='self.device.type != "cpu"',
        tests=(FIT,),
    ),
    Fault(
        "budget-reads-hidden-writes",
        "revnets/layers/lean/network.py",
        old="AS_MUCH * least and not writes.hidden",
        new="AS_MUCH * least",
        tests=(FIT,),
    ),
    Fault(
        "budget-plan-forgets-reading",
        "revnets/budget/plan.py",
        old="            put_plan(module, lean_plan)\n",
        new="",
        tests=(FIT,),
    ),
    Fault(
        "budget-compiled-gradients",
        "revnets/budget/compiled.py",
        old="            parameter.grad = grad\n",
        new="            pass\n",
        tests=("tests/budget/test_compiled.py",),
    ),
    Fault(
        "budget-compiled-buffers",
        "revnets/budget/compiled.py",
        old="                buffer.copy_(value)\n",
        new="                pass\n",
        tests=("tests/budget/test_compiled.py",),
    ),
    Fault(
        "budget-compiled-optimizer",
        "revnets/budget/compiled.py",
        old="max(resident + peak, self.figures.optimizer)",
        new="resident + peak",
        tests=("tests/budget/test_compiled.py",),
    ),
    Fault(
        "budget-compiled-always",
        "revnets/budget/planner.py",
        old="*(self.by_compiler if compiled else [])",
        new="*self.by_compiler",
        tests=("tests/budget/test_compiled.py",),
    ),
    Fault(
        "budget-compiled-share",
        "revnets/profiling/compiled.py",
        old="config.patch(activation_memory_budget=share)",
        new="config.patch(activation_memory_budget=1.0)",
        tests=("tests/budget/test_compiled.py",),
    ),
)
