"""Makes the mutants: mutmut's faults in every file of the scope, each a small change of one expression or statement."""

import ast
import difflib
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import libcst
from libcst import matchers as m
from mutmut.mutation.mutators import mutation_operators

# What no test looks at: types, arguments of decorators, the wording of errors and of what is logged, public names.
TEXT = m.Raise() | m.Expr(m.Call(m.Attribute(m.Name("logger")))) | m.Call(m.Name("InputError") | m.Name("one_line"))
TYPES = m.Annotation() | m.Call(m.Name("TypeVar") | m.Name("cast")) | m.Assign(value=m.Subscript(m.Name("Callable")))
SKIPPED = TEXT | TYPES | m.Decorator() | m.Assign([m.AssignTarget(m.Name("__all__"))])


@dataclass(frozen=True)
class Mutant:
    """path: relative to the root. number: of the same changes of the same text in a file, which one this is."""

    path: str
    module: libcst.Module
    node: libcst.CSTNode
    changed: libcst.CSTNode
    number: int

    @cached_property
    def name(self) -> str:
        """The same wherever the code around the fault changes. Names put mutants into a random order."""
        was, becomes = (self.module.code_for_node(node) for node in (self.node, self.changed))
        return hashlib.sha1(f"{self.path}\n{was}\n{becomes}\n{self.number}".encode()).hexdigest()[:12]

    @cached_property
    def code(self) -> str:
        return self.module.deep_replace(self.node, self.changed).code

    @cached_property
    def diff(self) -> str:
        """The path, then the lines that change."""
        lines = difflib.ndiff(self.module.code.splitlines(), self.code.splitlines())
        return "\n".join([self.path, *(f"{line[0]} {line[1:].strip()}" for line in lines if line[0] in "-+")])

    @property
    def line(self) -> int:
        """The number, from 1, of the first line that changes."""
        both = zip(self.module.code.splitlines(), self.code.splitlines(), strict=False)
        return next(number for number, (was, becomes) in enumerate(both, 1) if was != becomes)

    @property
    def is_a_fault(self) -> bool:
        """Whether it is Python, and other Python than before."""
        try:
            return ast.dump(ast.parse(self.code)) != ast.dump(ast.parse(self.module.code))
        except SyntaxError:
            return False


class Faults(libcst.CSTVisitor):
    """Collects (node, changed node)."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[libcst.CSTNode, libcst.CSTNode]] = []

    def on_visit(self, node: libcst.CSTNode) -> bool:
        if m.matches(node, SKIPPED):
            return False
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                self.found += [(node, changed) for changed in operator(node) if not drops_strict(node, changed)]
        return not m.matches(node, m.Arg(keyword=m.Name("strict")))


def drops_strict(node: libcst.CSTNode, changed: libcst.CSTNode) -> bool:
    """Whether it only changes the `strict=True` of zip, an assertion that never fails."""
    strict = [
        [arg for arg in call.args if m.matches(arg, m.Arg(keyword=m.Name("strict")))]
        for call in (node, changed)
        if isinstance(call, libcst.Call)
    ]
    return len(strict) == 2 and strict[0] != strict[1]


def mutants_of(root: Path, path: str) -> Iterator[Mutant]:
    module, faults, seen = libcst.parse_module((root / path).read_text(encoding="utf-8")), Faults(), Counter()
    module.visit(faults)
    for node, changed in faults.found:
        key = module.code_for_node(node), module.code_for_node(changed)
        seen[key] += 1
        yield Mutant(path, module, node, changed, seen[key])
