"""Prompt syntax gives what AUTOMATIC1111 gives; templates give the texts of their choices, the same for a seed."""

from __future__ import annotations

import itertools
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from genkit import InputError
from genkit.rows.syntax import composed, lora_tags, scheduled, weighted
from genkit.rows.wildcards import combinations, expand

DEEP = 100_000
HOUSE = [
    ("a ", 1.0), ("house", 1.5730000000000004), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55),
    (", sun, ", 1.1), ("sky", 1.4641000000000006), (".", 1.1),
]  # fmt: skip


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).", HOUSE),
        ("", [("", 1.0)]),
        ("()", [("", 1.0)]),
        ("((w))", [("w", 1.1 * 1.1)]),
        ("[w]", [("w", 1 / 1.1)]),
        ("(a: 1.5 )", [("a", 1.5)]),
        ("(a:-1)", [("a", -1.0)]),
        ("a) b] c", [("a) b] c", 1.0)]),
        ("a:1.5) b: c", [("a:1.5) b: c", 1.0)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.1 * (1 / 1.1)), (" c", 1 / 1.1)]),
        ("[a (b", [("a ", 1 / 1.1), ("b", 1.1 * (1 / 1.1))]),
        (r"a\b \\ \(c\)", [("ab \\ (c)", 1.0)]),
        ("[a:b:0.5]", [("a:b:0.5", 1 / 1.1)]),
    ],
)
def test_attention(text: str, pieces: list[tuple[str, float]]) -> None:
    assert weighted(text) == [pieces]


@pytest.mark.parametrize(
    "text, chunks",
    [
        ("a BREAK b", [[("a", 1.0)], [("b", 1.0)]]),
        ("a (b)\n BREAK\n (c:1.2) d", [[("a ", 1.0), ("b", 1.1)], [("c", 1.2), (" d", 1.0)]]),
        ("BREAK BREAK a", [[("", 1.0)], [("", 1.0)], [("a", 1.0)]]),
        ("(a BREAK b:1.2)", [[("a", 1.2)], [("b", 1.2)]]),
        ("BREAKFAST, break, aBREAK", [[("BREAKFAST, break, aBREAK", 1.0)]]),
    ],
)
def test_break_begins_a_chunk(text: str, chunks: list[list[tuple[str, float]]]) -> None:
    assert weighted(text) == chunks


@pytest.mark.parametrize(
    "text", ["(a:1.2.3)", "(a:.)", "(a:" + "9" * 400 + ")", "((a:" + "9" * 200 + "):" + "9" * 200 + ")"]
)
def test_a_weight_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"not a number|any number"):
        weighted(text)


def each(*texts: str, steps: int = 10) -> list[tuple[int, str]]:
    return [(i + 1, texts[i % len(texts)]) for i in range(steps)]


@pytest.mark.parametrize(
    "text, schedule",
    [
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("a [{b|d{:.5] c", [(5, "a  c"), (10, "a {b|d{ c")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[a|(b:1.1)]", each("a", "(b:1.1)")),
        ("[fe|]male", each("female", "male")),
        ("[fe|||]male", each("female", "male", "male", "male")),
        ("[b::3]", [(3, "b"), (10, "")]),
        ("[a:b:0.25]", [(2, "a"), (10, "b")]),
        ("[a:b:1.0]", [(10, "a")]),
        ("[a:b:20]", [(10, "a")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:-1]", [(10, "b")]),
        ("[a:b:1e999]", [(10, "a")]),
        ("[3:4]", [(4, ""), (10, "3")]),
        ("[[a|b]|c]", each("a", "c")),
        ("[[a|b]:c:2]", each("a", "b", steps=2) + [(i, "c") for i in range(3, 11)]),
        ("[[a:b:2]|c]", [(i, "a" if i == 1 else "b" if i % 2 else "c") for i in range(1, 11)]),
        ("[a:b:c:3]", [(10, "[a:b:c:3]")]),
        ("[(a:b:c):3]", [(10, "[(a:b:c):3]")]),
        ("[a|b:c]", [(10, "[a|b:c]")]),
        ("[a] [a:b] [:] []", [(10, "[a] [a:b] [:] []")]),
        (r"\[a:b:3\] [a\:b:c:3]", [(3, r"\[a:b:3\] a\:b"), (10, r"\[a:b:3\] c")]),
        ("a | b [c:3] \\", [(3, "a | b  \\"), (10, "a | b c \\")]),
    ],
)
def test_prompt_editing(text: str, schedule: list[tuple[int, str]]) -> None:
    assert scheduled(text, 10) == schedule


def test_a_documented_prompt_changes_at_its_fractions() -> None:
    text = (
        "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in foreground::0.6]"
        "[ in background:0.25] [shoddy:masterful:0.5]"
    )
    assert scheduled(text, 100) == [
        (25, "fantasy landscape with a mountain and an oak in foreground shoddy"),
        (50, "fantasy landscape with a lake and an oak in foreground in background shoddy"),
        (60, "fantasy landscape with a lake and an oak in foreground in background masterful"),
        (75, "fantasy landscape with a lake and an oak in background masterful"),
        (100, "fantasy landscape with a lake and a christmas tree in background masterful"),
    ]


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "5"])
def test_steps_are_a_whole_number(steps: int) -> None:
    with pytest.raises(InputError, match="number of steps"):
        scheduled("a", steps)


def test_any_depth_of_brackets_is_read_or_refused() -> None:
    for bracket in "([":
        with pytest.raises(InputError, match="more than 200 brackets"):
            weighted(bracket * DEEP)
        assert scheduled(bracket * DEEP, 5) == [(5, bracket * DEEP)]
    balanced = "[" * DEEP + "a" + "]" * DEEP
    assert scheduled(balanced, 5) == [(5, balanced)]
    assert scheduled("[" * DEEP + "a" + ":3]" * DEEP, 5) == [(3, ""), (5, "a")]
    assert scheduled("[a|" * 5000 + "]" * 5000, 2) == [(1, "a"), (2, "")]
    with pytest.raises(InputError, match="changes so often"):
        scheduled("[a|b]" * 10_000, 1000)
    for text in ("{" * 90_000, "{" * 21 + "a" + "}" * 21):
        with pytest.raises(InputError, match="more than 20 choices"):
            expand(text, 0, None)
    assert expand("{" * 20 + "a" + "}" * 20, 0, None) == "a"


@pytest.mark.parametrize(
    "text, parts",
    [
        ("a cat", [("a cat", 1.0)]),
        ("a AND b :1.2", [("a", 1.0), ("b", 1.2)]),
        ("a:0.5 AND b: -1 AND\nc :.5", [("a", 0.5), ("b", -1.0), ("c", 0.5)]),
        ("a AND ", [("a", 1.0), ("", 1.0)]),
        ("SAND and ANDES", [("SAND and ANDES", 1.0)]),
        ("a:1:2", [("a:1", 2.0)]),
        ("(a:1.2)", [("(a:1.2)", 1.0)]),
    ],
)
def test_composition(text: str, parts: list[tuple[str, float]]) -> None:
    assert composed(text) == parts


def test_a_weight_of_composition_is_finite() -> None:
    with pytest.raises(InputError, match="not a number"):
        composed("a AND b:" + "9" * 400)


@pytest.mark.parametrize(
    "text, rest, tags",
    [
        ("a <lora:x:0.8> b", "a  b", [("x", 0.8, 0.8)]),
        ("<lora:x>", "", [("x", 1.0, 1.0)]),
        ("<lora:x:0.8:0.5>", "", [("x", 0.5, 0.8)]),  # AUTOMATIC1111: the text encoder first
        ("<lyco:x y:-1>a<lora:d/z:te=0.2:unet=.3>", "a", [("x y", -1.0, -1.0), ("d/z", 0.3, 0.2)]),
        ("<lora:x:0.5:unet=0.8>", "", [("x", 0.8, 0.5)]),
        ("<lora:x:unet=0.8>", "", [("x", 0.8, 1.0)]),
        ("<3 a <cat-toy> b<c d>e: <lorax>", "<3 a <cat-toy> b<c d>e: <lorax>", []),
    ],
)
def test_tags(text: str, rest: str, tags: list[tuple[str, float, float]]) -> None:
    assert lora_tags(text) == (rest, tags)


@pytest.mark.parametrize(
    "text, message",
    [
        ("<lora:>", "names no file"),
        ("<lora::1>", "names no file"),
        ("<lora>", "is no tag"),
        ("a <lora:x", "is no tag"),
        ("<lora: <lora:x>>", "is no tag"),
        ("<lora:x:a>", "'a', not a number"),
        ("<lora:x:>", "'', not a number"),
        ("<lora:x:nan>", "not a number"),
        ("<lora:x:1:2:3>", "'3' is one too many"),
        ("<lora:x:1:te=2>", "te is given twice"),
        ("<lora:x:ue=2>", "'ue=2' is no weight"),
        ("<lora:x:unt=2>", "did you mean 'unet'"),
        ("<LoRA:x:1>", "did you mean 'lora'"),
        ("<hypernet:x:1>", "no such tags"),
    ],
)
def test_a_malformed_tag_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        lora_tags(text)
    assert "\n" not in str(error.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "wildcards"
    (found / "dir").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret\n")
    for name, text in {
        "color": "# all of them\nred\n\n  green \r\n{dark|light} blue\n",
        "dir/thing": "\ufeff__color__ house\ncat",
        "a": "x\n__b__\n",
        "b": "{y|__a__}",
        "comments": "# a\n\n",
        "broken": "ok\n{a|b\n",
        "weights": "{2::a|b}",
        "every": "{e$$a|b}",
        **{f"deep{i}": f"__deep{i + 1}__" for i in range(21)},
        "deep21": "end",
        **{f"wide{i}": f"__wide{i + 1}__" * 3 for i in range(12)},
        "wide12": "wide",
        **{f"empty{i}": f"__empty{i + 1}__" * 3 for i in range(12)},
        "empty12": "{|}",
    }.items():
        (found / f"{name}.txt").write_text(text, newline="")
    os.symlink(tmp_path / "secret.txt", found / "link.txt")
    os.symlink("color.txt", found / "inside.txt")
    return found


COLORS = {"red", "green", "dark blue", "light blue"}


@pytest.mark.parametrize(
    "template, texts",
    [
        ("a cat", {"a cat"}),
        ("{a|b}", {"a", "b"}),
        ("{ a | b }c", {"a c", "b c"}),
        ("{a}{|b}", {"a", "ab"}),
        ("{a|{b|c} {d|e}}", {"a", "b d", "b e", "c d", "c e"}),
        ("{2$$a|b|c}", {"a,b", "a,c", "b,a", "b,c", "c,a", "c,b"}),
        ("{1-2$$ and $$a|b}", {"a", "b", "a and b", "b and a"}),
        ("{-1$$a|b}", {"a", "b"}),
        ("{2-$$ $$a|b}", {"a b", "b a"}),
        ("{0-1$$a|b}", {"", "a", "b"}),
        ("{2$$|$$a|b}", {"a|b", "b|a"}),
        ("{2:: a|0::b|.5::c}", {" a", "c"}),
        ("{2$$a|0::b|c}", {"a,c", "c,a"}),
        ("__color__", COLORS),
        ("{x|__inside__}", {"x"} | COLORS),
        ("__dir/thing__!", {f"{c} house!" for c in COLORS} | {"cat!"}),
        ("{2$$ __color__}", {f"{a},{b}" for a in COLORS for b in COLORS if a.split()[-1] != b.split()[-1]}),
        (r"\{a|b\} {c\|d} \__color__ ^__^ \( \\ $5 50%", {r"{a|b} c|d __color__ ^__^ \( \\ $5 50%"}),
        ("a | b [c|d] std::x", {"a | b [c|d] std::x"}),
        ("{std::x}", {"std::x"}),
    ],
)
def test_a_template_gives_all_of_its_texts_and_no_others(template: str, texts: set[str], folder: Path) -> None:
    assert {expand(template, seed, folder) for seed in range(400)} == texts


def test_weights_are_kept_to() -> None:
    found = Counter(expand("{3::a|b}", seed, None) for seed in range(2000))
    assert 1420 < found["a"] < 1580
    counts = Counter(expand("{1-3$$a|b|c}", seed, None).count(",") for seed in range(3000))
    assert all(900 < counts[n] < 1100 for n in range(3))


def test_a_text_depends_on_its_template_seed_and_files_only(folder: Path) -> None:
    template = "{2$$a|b|c} __dir/thing__ {1-2$$ and $$x|{y|z}}"
    alone = [expand(template, seed, folder) for seed in range(50)]
    random.seed(1)
    state = random.getstate()
    beside = []
    for seed in reversed(range(50)):
        expand("{other|row} __color__", seed + 7, folder)
        beside.append(expand(template, seed, folder))
    assert beside[::-1] == alone and len(set(alone)) > 20
    assert random.getstate() == state
    assert [expand("{a|b|c|d|e}", seed, None) for seed in range(8)] == list("eaebbddb")  # also in the next release


def test_a_file_that_changed_is_read_again(folder: Path) -> None:
    assert expand("__color__", 0, folder) in COLORS
    (folder / "color.txt").write_text("violet\n")
    assert expand("__color__", 0, folder) == "violet"


@pytest.mark.parametrize(
    "template, message",
    [
        ("{a|b", "is not closed"),
        ("a}", "closes nothing"),
        ("{}", "holds no choice"),
        ("{a$$b|c}", "follows no number"),
        ("{3$$a|b}", "takes 3, more than the 2"),
        ("{3-$$a|b}", "takes 3, more than the 2"),
        ("{2-1$$a|b}", "2 to 1"),
        ("{2$$a|0::b}", "takes 2, more than the 1"),
        ("{0::a|0::b}", "takes 1, more than the 0"),
        ("{4$$__color__}", "takes 4, more than the 3"),
        ("{2$$3::__color__}", "takes 2, more than the 1"),
        ("{5000$$a|b}", "the most is 1000"),
        ("{-1::a|b}", "no weight"),
        ("{1e3::a|b}", "no weight"),
        ("{1$$__color__$$a|b}", "separator cannot be"),
        ("{!a|b}", "there is no !"),
        ("${x=a}", "no variables"),
        ("%{a$$b}", "no variables"),
        ("{e$$a|b}", "all combinations"),
        ("{a|{e$$b}}", "inside a choice at random"),
        ("__a__", "__a__ → __b__ → __a__: these wildcards lead back"),
        ("{x|y|{z|__b__}}", "__b__ → __a__ → __b__"),
        ("__deep0__", "more than 20 wildcards"),
        ("{" * 10 + "__deep10__" + "}" * 10, "more than 20 choices and wildcards"),
        ("__wide0__", "more than 100,000 characters"),
        ("__empty0__", "more than 100,000 choices"),
        ("a" * 100_001, "100,001 characters"),
        ("__colr__", r"did you mean 'color'\?"),
        ("__thing__", r"did you mean 'dir/thing'\?"),
        ("__" + "n" * 5000 + "__", "no such file"),
        ("__dir__", "no such file"),
        ("__../secret__", "leads out"),
        ("__dir/../../secret__", "leads out"),
        ("__/etc/passwd__", "leads out"),
        ("__~/secret__", "leads out"),
        ("__link__", "link that leads out"),
        ("__c*__", "no name of a wildcard"),
        ("__!color__", "no name of a wildcard"),
        ("__C:/x__", "no name of a wildcard"),
        ("__dir\\thing__", "no name of a wildcard"),
        ("__comments__", "comments.txt: holds no line"),
        ("__broken__", "broken.txt: line 2: .*is not closed"),
        ("__every__", "belongs in a template"),
    ],
)
def test_what_is_malformed_is_refused_for_every_seed(template: str, message: str, folder: Path) -> None:
    for seed in range(3):
        with pytest.raises(InputError, match=message) as error:
            expand(template, seed, folder)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_wildcards_need_their_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder of wildcards"):
        expand("__color__", 0, None)
    with pytest.raises(InputError, match="absent: is no folder"):
        expand("__color__", 0, tmp_path / "absent")


@pytest.mark.parametrize("seed", [-1, 1.5, "1", True, None])
def test_a_seed_is_a_whole_number(seed: int) -> None:
    with pytest.raises(InputError, match="seed"):
        expand("{a|b}", seed, None)


@pytest.mark.parametrize(
    "template, texts",
    [
        ("plain {a|b}", ["plain {a|b}"]),
        ("{e$$a|b} {e$$1|2}", ["a 1", "a 2", "b 1", "b 2"]),
        ("{e$$a {x|y}|b}", ["a x", "a y", "b"]),
        ("{e$$a|{e$$b|c}} {x|y} __color__", [f"{c} {{x|y}} __color__" for c in "abc"]),
        ("{e$$2$$a|b|{c|d}}", ["a,b", "a,c", "a,d", "b,a", "b,c", "b,d", "c,a", "d,a", "c,b", "d,b"]),
        ("{e$$0-1$$a|b}", ["", "a", "b"]),
        ("{e$$0$$__color__}", [""]),
        ("{e$$__color__}", ["red", "green", "dark blue", "light blue"]),
        ("{e$$__dir/thing__}", ["red house", "green house", "dark blue house", "light blue house", "cat"]),
        ("{e$$2$$ $$__inside__}", ["red green", "red dark blue", "red light blue", "green red", "green dark blue",
         "green light blue", "dark blue red", "light blue red", "dark blue green", "light blue green"]),
        (r"{e$$\{a\}|b}", [r"\{a\}", "b"]),
    ],
)  # fmt: skip
def test_combinations(template: str, texts: list[str], folder: Path) -> None:
    found = combinations(template, folder)
    assert found == texts
    assert len(found) == len(combinations(template, folder, limit=len(texts)))
    if len(found) > 1:
        with pytest.raises(InputError, match=f": {len(texts)} combinations, more than {len(texts) - 1}$"):
            combinations(template, folder, limit=len(texts) - 1)
    for text in found:
        expand(text, 0, folder)


def test_the_count_is_the_product_of_the_choices() -> None:
    for sizes in itertools.product((1, 2, 5), repeat=3):
        template = " ".join("{e$$" + "|".join(f"{i}x{j}" for j in range(n)) + "}" for i, n in enumerate(sizes))
        found = combinations(template, None)
        assert len(found) == len(set(found)) == sizes[0] * sizes[1] * sizes[2]


@pytest.mark.parametrize(
    "template, message",
    [
        ("{e$$a|b}" * 17, ": 131,072 combinations, more than 100,000"),
        ("{e$$a|b}" * 400, r"about 10\^120 combinations"),
        ("{e$$a|b}" * 12_000, r"more than 10\^3010 combinations"),
        ("{e$$10$$" + "|".join("abcdefghijklmnopqrst") + "}", "670,442,572,800 combinations"),
        ("{e$$1-1000$$" + "|".join("a" * 2000) + "}", "too many combinations to count"),
        ("{e$$" + "x" * 60_000 + "}" + "{e$$a|b}" * 10, "characters in combinations, more than 50,000,000"),
        ("{e$$2::a|b}", "weights have no meaning"),
        ("{e$$__weights__}", "weights have no meaning"),
        ("{e$$__a__}", "lead back"),
        ("{x|__b__}", "lead back"),
        ("{x|{e$$a|b}}", "inside a choice at random"),
        ("{e$$ and $$a|b}", "follows no number"),
    ],
)
def test_too_many_or_malformed_combinations_are_refused(template: str, message: str, folder: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        combinations(template, folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_limit_is_a_whole_number() -> None:
    for limit in (0, 1.5, True):
        with pytest.raises(InputError, match="limit"):
            combinations("{e$$a|b}", None, limit)  # type: ignore[arg-type]
