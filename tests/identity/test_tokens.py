"""The token hash: blind to what cannot change a result, and to nothing else; the same under every
Python.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from ftsec_ray.identity.lock import ROOT as PACKAGE
from ftsec_ray.identity.lock import read_lock
from ftsec_ray.identity.tokens import file_token_hash, normal_tokens, token_hash
from tests.identity.interpreters import ROOT, SUPPORTED, output_under

GOLDEN_SOURCE = ROOT / "tests/identity/golden_source.txt"
GOLDEN_HASH = "ec5b12f103b1cc796af5109f057bfe89"
TOKENS = "ftsec_ray/identity/tokens.py"


@pytest.mark.parametrize("version", SUPPORTED)
def test_a_fixed_source_has_the_same_hash_under_every_python(version):
    assert file_token_hash(GOLDEN_SOURCE) == GOLDEN_HASH
    assert output_under(version, TOKENS, str(GOLDEN_SOURCE)).split() == [GOLDEN_HASH]


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_file_of_the_lock_has_its_hash_under_every_python(version):
    locked = read_lock().files
    printed = output_under(version, TOKENS, *(str(PACKAGE / path) for path in locked))
    assert dict(zip(locked, printed.split(), strict=True)) == dict(locked)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x = 1\n", "# why\n\nx  =  1  # because"),
        ('def f():\n    """Doc."""\n    return 1\n', "def f():\n  'Other.' ' doc'\n  return 1"),
        ('class A:\n    size: int\n    """What."""\n', "class A:\n    size: int\n"),
        ("x = 'a'", 'x = "a"'),
        ('x = "it\'s"', "x = 'it\\'s'"),
        ("x = 'a' 'b'", 'x = ("a"\n     "b")'),
        ("x = f'a{y}' 'b'", 'x = f"a{ y }b"'),
        ("x = f'{y!r:>{w}}' f'{{'", 'x = f"{y!r:>{w}}{{"'),
        ('x = f"""{a["k"]}"""', "x = f\"{a['k']}\""),
        ("x = R'\\d'", "x = '\\\\d'"),
        ("f(a, b)", "f(\n    a,\n    b,\n)"),
        ("x = [a, b]", "x = [\n    a,\n    b,\n]"),
        ("def f(a, *, b): return a", "def f(\n    a,\n    *,\n    b,\n): return a"),
        ("x = a, b", "x = (\n    a,\n    b,\n)"),
        ("return_value = a or b", "return_value = (\n    a\n    or b\n)"),
        ("from a import b, c", "from a import (\n    b,\n    c,\n)"),
        ("if a and b:\n    c()", "if (\n    a\n    and b\n):\n    c()"),
        ("x = 0XfF + 1_000", "x = 0xff + 1000"),
    ],
)
def test_comments_docstrings_and_layout_do_not_count(one, other):
    assert normal_tokens(one) == normal_tokens(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x = 1", "x = 2"),
        ("x = 1", "x = 1.0"),
        ("x = 1", "y = 1"),
        ("x = (1,)", "x = (1)"),
        ("f((a,))", "f((a))"),
        ("x = y[a,]", "x = y[a]"),
        ("x = (lambda a, b: a,)", "x = (lambda a, b: a)"),
        ("match (a,):\n    case _: pass", "match (a):\n    case _: pass"),
        ("x = (a for a in b)", "x = [a for a in b]"),
        ("x = (a + b) * c", "x = a + b * c"),
        ("x = y in (a if b else c)", "x = y in a if b else c"),
        ("x = ()", "x ="),
        ("x = 'a'", "x = b'a'"),
        ("x = 'a' 'b'", "x = 'a', 'b'"),
        ("x = r'\\n'", "x = '\\n'"),
        ("x = f'{y}'", "x = '{y}'"),
        ("x = f'{y}'", "x = f'{{y}}'"),
        ("x = f'{y}'", "x = f'{y!r}'"),
        ("x = f'{y}'", "x = f'{y:1}'"),
        ("x = f'{y}'", "x = f'{y=}'"),
        ("x = f'{y=}'", "x = f'{y =}'"),
        ("x = f'{y + 1}'", "x = f'{y + 2}'"),
        ("x = f'{y[1]:{w}}'", "x = f'{y[1]:{v}}'"),
        ("if a:\n    b()\nc()", "if a:\n    b()\n    c()"),
        ("if a: b(); c()", "if a: b()\nc()"),
        ("x: int = 1", "x: float = 1"),
        ("f('doc')", "f()"),
        ("x = 'not a docstring'", "x = 'nor this'"),
    ],
)
def test_what_can_change_a_result_counts(one, other):
    assert token_hash(one) != token_hash(other)


def test_the_formatter_changes_no_hash(tmp_path):
    copy = tmp_path / "source.py"
    copy.write_text(GOLDEN_SOURCE.read_text().replace("; other = 1", ""), encoding="utf-8")
    before = copy.read_text(), file_token_hash(copy)
    subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--isolated", str(copy)],
        check=True,
        capture_output=True,
    )
    assert copy.read_text() != before[0]
    assert file_token_hash(copy) == before[1]


def test_what_is_not_python_is_refused():
    for text in ("x = 'open", "x = f'{y'", "x = f'{y!}'", "x = $"):
        with pytest.raises((SyntaxError, ValueError)):
            token_hash(text)
