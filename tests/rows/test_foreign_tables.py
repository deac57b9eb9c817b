"""Prompt tables as other tools write them: gaps, separators, headers, sampler names; what is ambiguous is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genkit import InputError
from genkit.rows.plans import scheduler_options
from genkit.rows.prompts import Rows, read_prompts
from genkit.schedulers.diffusers_config import CLASSES


def read(folder: Path, text: str, name: str = "a.csv", **defaults: Any) -> Rows:
    (folder / name).write_text(text, newline="")
    return read_prompts(folder / name, defaults)


def stated(rows: Rows) -> list[dict[str, Any]]:
    """Return what the rows state, without their numbers."""
    return [{k: getattr(r, k) for k in sorted(r.model_fields_set - {"id"}) if k != "num_images"} for r in rows]


FIELDS = (
    "negative_prompt",
    "seed",
    "steps",
    "cfg_scale",
    "width",
    "scheduler",
    "image",
    "keep",
    "gate",
    "labels",
    "meta",
)


@pytest.mark.parametrize("name", ["a.jsonl", "a.yaml"])
@pytest.mark.parametrize("field", [*FIELDS, "size", "n", "prune", "guidance_interval", "id"])
def test_null_states_nothing(field: str, name: str, tmp_path: Path) -> None:
    line = json.dumps({"prompt": "a fox", field: None})
    rows = read(tmp_path, line + "\n" if name == "a.jsonl" else f"- {line}\n", name, num_images=3)
    assert stated(rows) == [{"prompt": "a fox"}] and rows[0].num_images == 3 and rows[0].id == "000000"


@pytest.mark.parametrize("field", ["seed", "steps", "cfg_scale", "scheduler", "image", "size", "labels", "id", "gate"])
def test_an_empty_text_states_nothing(field: str, tmp_path: Path) -> None:
    rows = read(tmp_path, json.dumps({"prompt": "a fox", "negative_prompt": "", field: ""}) + "\n", "a.jsonl")
    assert stated(rows) == [{"negative_prompt": "", "prompt": "a fox"}]


def test_nan_is_a_gap_of_pandas_and_nothing_else(tmp_path: Path) -> None:
    rows = read(tmp_path, '{"prompt": "a", "seed": NaN, "negative_prompt": NaN, "steps": 20.0}\n', "a.jsonl")
    assert stated(rows) == [{"num_inference_steps": 20, "prompt": "a"}]
    for inside in ('"meta": {"x": NaN}', '"labels": ["a", NaN]', '"seed": [NaN]'):
        with pytest.raises(InputError):
            read(tmp_path, f'{{"prompt": "a", {inside}}}\n', "a.jsonl")


def test_gaps_of_a_table_with_numbers(tmp_path: Path) -> None:
    table = ",prompt,seed,steps,cfg_scale,width\n0,a fox,42.0,20.0,7,nan\n1,an owl,,,,512.0\n"
    rows = read(tmp_path, table)
    assert stated(rows) == [
        {"prompt": "a fox", "seed": 42, "num_inference_steps": 20, "guidance_scale": 7.0},
        {"prompt": "an owl", "width": 512},
    ]
    assert rows.notes == (f"{tmp_path}/a.csv:1: a column of row numbers is not used",)
    rows = read(tmp_path, '{"prompt": "a", "seed": [1.0, 2.0], "steps": 20.0}\n', "a.jsonl")
    assert rows[0].seed == [1, 2] and rows[0].num_inference_steps == 20 and type(rows[0].num_inference_steps) is int


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,seed\na,42.5\n", "seed: '42.5' is not a whole number"),
        ("prompt,seed\na,2.36112E+09\n", "seed: '2.36112E+09' was shortened by a spreadsheet"),
        ("prompt,seed\na,1e3\n", "was shortened by a spreadsheet"),
        ("prompt,steps\na,20;5\n", "num_inference_steps: '20;5' is not a whole number"),
        (",prompt\nfirst,a fox\n", "the column of 'first' has no name"),
        ("prompt,,seed\na,b,1\n", "column '' has no name"),
        ("prompt,\na fox,more\n", "has 2 cells under 1 columns"),
        ("prompt,Prompt\na,b\n", "prompt: given twice"),
    ],
)
def test_what_is_ambiguous_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert words in str(caught.value)


@pytest.mark.parametrize("separator", [";", "\t", "|"], ids=["semicolon", "tab", "bar"])
@pytest.mark.parametrize("begin", ["", "\ufeff", "sep"], ids=["plain", "bom", "sep="])
def test_separators_are_seen(separator: str, begin: str, tmp_path: Path) -> None:
    lines = [separator.join(cells) for cells in (("prompt", "negative_prompt", "seed"), ("a, b", "c, d", "7"))]
    head = f"sep={separator}\r\n" if begin == "sep" else begin
    rows = read(tmp_path, head + "\r\n".join(lines) + "\r\n")
    assert stated(rows) == [{"prompt": "a, b", "negative_prompt": "c, d", "seed": 7}]
    assert len(rows.notes) == 1 and "columns are separated by" in rows.notes[0]
    assert rows[0].source.endswith(":3" if begin == "sep" else ":2")


def test_commas_stay_commas(tmp_path: Path) -> None:
    rows = read(tmp_path, 'prompt,negative_prompt\n"a; b | c",d\n')
    assert stated(rows) == [{"prompt": "a; b | c", "negative_prompt": "d"}] and rows.notes == ()


def test_decimal_commas_where_columns_have_semicolons(tmp_path: Path) -> None:
    rows = read(tmp_path, "prompt;cfg_scale;strength;image;seed\na, 7,5 b;7,5;;;3\n")
    assert stated(rows) == [{"prompt": "a, 7,5 b", "guidance_scale": 7.5, "seed": 3}]


HEADERS = (
    "Prompt,Negative Prompt,CFG scale,Steps", "PROMPT,negative-prompt,Cfg_Scale,steps",
    " prompt ,Negative  prompt,cfg scale,STEPS",
)  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
def test_headers_in_any_case(header: str, tmp_path: Path) -> None:
    rows = read(tmp_path, f"{header},,\na fox,red,5,20,,\n,,,,,\n")
    assert stated(rows) == [
        {"prompt": "a fox", "negative_prompt": "red", "guidance_scale": 5.0, "num_inference_steps": 20}
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.yaml"])
def test_seed_minus_1_is_any(name: str, tmp_path: Path) -> None:
    text = {
        "a.csv": "prompt,seed\na,-1\n",
        "a.jsonl": '{"prompt": "a", "seed": -1}\n',
        "a.yaml": "- {prompt: a, seed: -1}\n",
    }
    rows = read(tmp_path, text[name], name)
    assert rows[0].seed is None and "seed -1 in 1 rows" in rows.notes[0]
    assert rows[0].seed_of(0, 1) != rows[0].seed_of(0, 2) != rows[0].seed_of(1, 2)


SAMPLERS = {  # AUTOMATIC1111, ComfyUI and diffusers
    "DPM++ 2M Karras": ("dpmpp_2m", "karras"), "Euler a": ("euler_ancestral", None), "PLMS": ("pndm", None),
    "UniPC": ("unipc", None), "DPM++ 2M SDE Exponential": ("sde-dpmpp_2m", "exponential"), "Heun": ("heun", None),
    "LMS Karras": ("lms", "karras"), "DPM2 a": ("dpm2_ancestral", None), "DPM++ SDE Karras": ("dpmpp_sde", "karras"),
    "dpmpp_2m_sde_gpu": ("sde-dpmpp_2m", None), "uni_pc": ("unipc", None), "k_euler_a": ("euler_ancestral", None),
    "DDIM": ("ddim", None), "LCM": ("lcm", None), "DPMSolverMultistepScheduler": ("dpmpp_2m", None),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", None), "PNDMScheduler": ("pndm", None),
    "KDPM2AncestralDiscreteScheduler": ("dpm2_ancestral", None), "UniPCMultistep": ("unipc", None),
    "sde-dpmpp_2m_karras": ("sde-dpmpp_2m", "karras"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_of_other_tools(name: str, tmp_path: Path) -> None:
    solver, spacing = SAMPLERS[name]
    expected = {"solver": solver, **({} if spacing is None else {"spacing": spacing})}
    assert scheduler_options(name) == expected
    (row,) = read(tmp_path, json.dumps({"prompt": "a", "sampler_name": name}) + "\n", "a.jsonl")
    assert row.scheduler is not None and scheduler_options(row.scheduler) == expected


@pytest.mark.parametrize("name", [n for n, made in CLASSES.items() if made["style"] not in ("edm", "flow")])
def test_every_class_of_diffusers_names_a_solver(name: str) -> None:
    from genkit.schedulers import Scheduler

    config = {"_class_name": name, **({"skip_prk_steps": True} if name == "PNDMScheduler" else {})}
    assert scheduler_options(name) == {"solver": Scheduler.from_config(config).solver}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"sampler_name": "dpmpp_2m", "scheduler": "karras"}, {"solver": "dpmpp_2m", "spacing": "karras"}),
        ({"sampler_name": "euler", "scheduler": "normal"}, {"solver": "euler"}),
        ({"sampler_name": "euler", "scheduler": "sgm_uniform"}, {"solver": "euler", "spacing": "trailing"}),
        ({"Sampler": "DPM++ 2M", "Schedule type": "Karras"}, {"solver": "dpmpp_2m", "spacing": "karras"}),
        ({"Sampler": "DPM++ 2M Karras", "Schedule type": "Karras"}, {"solver": "dpmpp_2m", "spacing": "karras"}),
        ({"sampler": "Euler a", "Schedule type": "Automatic"}, {"solver": "euler_ancestral"}),
        ({"schedule_type": "karras"}, {"spacing": "karras"}),
    ],
)
def test_a_schedule_beside_a_sampler(fields: dict[str, str], expected: dict[str, str], tmp_path: Path) -> None:
    (row,) = read(tmp_path, json.dumps({"prompt": "a", **fields}) + "\n", "a.jsonl")
    assert row.scheduler is not None and scheduler_options(row.scheduler) == expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sampler_name": "DPM adaptive"}, "'DPM adaptive': no solver"),
        (
            {"sampler_name": "euler", "scheduler": "karras", "schedule_type": "beta"},
            "the schedule of noise is given twice",
        ),
        ({"sampler_name": "FlowMatchEulerDiscreteScheduler"}, "no solver"),
        ({"sampler": "DPM++ 2M Karras", "Schedule type": "Exponential"}, "name two schedules of noise"),
        ({"sampler": "Euler", "Schedule type": "Turbo"}, "'Turbo': no schedule of noise"),
    ],
)
def test_samplers_that_are_not_there(fields: dict[str, str], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, json.dumps({"prompt": "a", **fields}) + "\n", "a.jsonl")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "requests:\n- prompt: a red ball #1 best quality, 8k\n",
        "- prompt: a red ball\n  negative_prompt: low quality # and blurred\n",
        "- {prompt: a, labels: [a cat #1\n, a dog]}\n",
        "defaults: {negative_prompt: a\n    b #c\n  }\nrequests: [{prompt: a}]\n",
    ],
)
def test_text_that_yaml_cuts_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is cut at ' #', where YAML begins a comment; put it in quotes"):
        read(tmp_path, text, "a.yaml")


def test_comments_elsewhere_are_comments(tmp_path: Path) -> None:
    text = "# all of it\n- prompt: 'a #1 ball' # quoted\n  scheduler: ddim # fast\n  steps: 3 # few\n- prompt: a#b\n"
    assert [r.prompt for r in read(tmp_path, text, "a.yaml")] == ["a #1 ball", "a#b"]


FOREIGN = {
    "infotext": (
        "a (witch:1.2) {x}\nNegative prompt: blender\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1\n",
        {"prompt": "a (witch:1.2) \\{x\\}", "negative_prompt": "blender", "num_inference_steps": 20, "seed": 1,
         "scheduler": "euler_ancestral", "guidance_scale": 7.0, "syntax": "a1111"},
    ),
    "a1111-lines": (
        '--prompt "a {witch|fox}" --steps 20 --seed 3\n',
        {"prompt": "a {witch|fox}", "num_inference_steps": 20, "seed": 3, "syntax": "a1111"},
    ),
    "kohya": ("a witch --n blurred --w 512 --s 20\n",
              {"prompt": "a witch", "negative_prompt": "blurred", "width": 512, "num_inference_steps": 20}),
}  # fmt: skip


@pytest.mark.parametrize("form", FOREIGN)
def test_prompt_files_of_other_tools_are_recognised(form: str, tmp_path: Path) -> None:
    text, fields = FOREIGN[form]
    rows = read(tmp_path, text, "a.txt")
    assert stated(rows) == [{key: fields[key] for key in sorted(fields)}]
    assert any("read as" in note for note in rows.notes)
    (tmp_path / "a.prompts").write_text(text)
    assert stated(read_prompts(tmp_path / "a.prompts", format_in=form)) == stated(rows)
    assert stated(read_prompts(tmp_path / "a.txt", {"num_images": 3}, form)) == stated(rows)


def test_a_graph_of_comfyui_is_a_prompt_file(tmp_path: Path) -> None:
    from tests.rows.test_infotext import sdxl

    (tmp_path / "style.safetensors").touch()
    graph = {name: node for name, node in sdxl().items() if name not in ("16", "17")}  # without its second pass
    (row,) = read(tmp_path, json.dumps(graph), "graph.json")
    assert (row.prompt, row.clip_skip, row.num_images) == ("a fox", 2, 2)
    assert row.loras and row.loras[0]["file"] == str(tmp_path / "style.safetensors")
    for name in ("text_g", "text_l"):
        graph["6"]["inputs"][name] = "a (red:1.2) fox"
    with pytest.raises(InputError, match=r"graph.json: prompt: .* weighs words"):
        read(tmp_path, json.dumps(graph), "graph.json")


def test_bad_forms(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a fox\n")
    with pytest.raises(InputError, match=r"--format-in: 'kohia': .*did you mean 'kohya'"):
        read_prompts(tmp_path / "a.txt", format_in="kohia")
    with pytest.raises(InputError, match=r"a\.txt:1: "):
        (tmp_path / "a.txt").write_text("a fox --w 7x\n")
        read_prompts(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("a fox --w 512\n")
    with pytest.raises(InputError, match="options in a line are not read"):
        read_prompts(tmp_path / "a.txt", format_in="genkit")


def test_lines_that_only_look_like_it_are_prompts(tmp_path: Path) -> None:
    assert [r.prompt for r in read(tmp_path, "Steps: a staircase\nnegative space\n", "a.txt")] == [
        "Steps: a staircase", "negative space",
    ]  # fmt: skip


def test_notes_reach_the_plan(tmp_path: Path) -> None:
    from genkit.job.plan import plan_job
    from genkit.options import Options

    job = plan_job(read(tmp_path, "prompt;seed\na;-1\n"), Options(), {})
    assert len(job.notes) == 2 and job.describe()["notes"] == list(job.notes)


@pytest.mark.parametrize("place", ["~/rows.txt", "$ROWS/rows.txt", "${ROWS}/a folder é/rows.txt"])
def test_home_variables_and_blanks_in_a_path(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ROWS", str(tmp_path))
    for folder in (tmp_path, tmp_path / "a folder é"):
        folder.mkdir(exist_ok=True)
        (folder / "rows.txt").write_text("a fox\n")
    assert len(read_prompts(place)) == 1


def test_a_file_of_tabs_by_its_suffix(tmp_path: Path) -> None:
    assert stated(read(tmp_path, "prompt\tseed\na, b\t7\n", "a.tsv")) == [{"prompt": "a, b", "seed": 7}]


@pytest.mark.parametrize("name", ["in put/a.png", "in put\\\\a.png", "./in put/a.png", "$PICTURES/a.png"])
def test_pictures_of_rows_by_any_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setenv("PICTURES", str(tmp_path / "in put"))
    (tmp_path / "in put").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "in put" / "a.png")
    (row,) = read(tmp_path, f'{{"prompt": "a", "image": "{name}"}}\n', "a.jsonl")
    assert Path(row.image) == tmp_path / "in put" / "a.png"


def test_a_table_of_a_spreadsheet_for_another_interface(tmp_path: Path) -> None:
    head = "Prompt;Sampler;Schedule type;CFG scale;Steps;Seed;"
    rows = read(tmp_path, f"{head}\na fox;DPM++ 2M;Karras;7,5;20.0;-1;\nan owl;;;;;;\n")
    assert [note.split(": ")[1] for note in rows.notes] == ["columns are separated by semicolons", "seed -1 in 1 rows"]
    assert stated(rows) == [
        {"prompt": "a fox", "scheduler": {"solver": "dpmpp_2m", "spacing": "karras"}, "guidance_scale": 7.5,
         "num_inference_steps": 20},
        {"prompt": "an owl"},
    ]  # fmt: skip
