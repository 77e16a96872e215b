"""Configurations and `--set` are YAML 1.2: nothing is cut, turned into
another number, or absurd; what is no text is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import tiny_config, tiny_settings

from kr_ray.cluster.submit import entrypoint
from kr_ray.config import ConfigError, EdmConfig, EdmSampling, Section
from kr_ray.config.dp import DpdfdTeacher, DpMerfConfig, DpSgdTeacher, PrivacySection
from kr_ray.config.file import load_config, parse_config
from kr_ray.config.kinds import METHODS
from kr_ray.config.limits import LARGEST
from kr_ray.config.privacy import RunPrivacyConfig
from kr_ray.foreign.yaml_core import YamlError, read_value, read_yaml, write_yaml
from kr_ray.plan.estimate import Devices
from kr_ray.runs.storage import LocationError, check_location, make_folder

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"
LONG = "a" * 300


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("name: x".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        ("name: Größe\n".encode("latin-1"), r"not UTF-8 \(0xf6 in line 1\); save it as UTF-8"),
        (b"\x7fELF" + bytes(range(256)), "a program; correct the path"),
        (b"", "an empty file"),
        (bytes(10), "zeros only"),
        (LFS, "git lfs pull"),
        (b"#" * 300_000, "more than 262,144 bytes"),
        (b"null", "holds nothing; see configs/"),
        (b"- a", "holds a list"),
        (b"a: &a [*a]", "an alias stands for something that holds it"),
        (b"a: !!python/name:os.system x", "no value of the tag"),
        (b"a: [" + b"[" * 2000, "too deeply"),
        (b"a: 1\n---\nb: 2", "single document"),
        (b"? [1]\n: 2", "a key is a list or mapping; use text for keys"),
        (b'a: "\\ud800"', "lone surrogate"),
        (b"a: " + b"9" * 5000, "a number has 5000 digits"),
    ],
)
def test_no_configuration_is_told_what_it_is(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_aliases_of_aliases_do_not_fill_the_memory() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k + 1}: &a{k + 1} [{', '.join([f'*a{k}'] * 10)}]" for k in range(30)]
    with pytest.raises(YamlError, match="more than 20,000 values"):
        read_yaml("\n".join(lines))


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + write_yaml(tiny_settings()).encode())
    assert load_config(path).name == "tiny"


CORE = {  # examples of yaml.org/spec/1.2.2, 10.3.2, and what YAML 1.1 reads otherwise
    "null": None, "~": None, "": None, "true": True, "False": False, "0": 0, "0o7": 7, "0x3A": 58, "-19": -19,
    "0.": 0.0, "-0.0": -0.0,
    ".5": 0.5, "+12e03": 12000.0, "-2E+05": -200000.0, ".inf": float("inf"), "-.Inf": float("-inf"),
    "1e-5": 1e-5,
    "010": 10, "12:30": "12:30", "yes": "yes", "off": "off", "1_000": "1_000", "2026-01-01": "2026-01-01",
    "0b11": "0b11", "=": "=",
    "!!str 12": "12", '"12"': "12", "'a''b'": "a'b",
}  # fmt: skip


@pytest.mark.parametrize("text", CORE)
def test_scalars_are_those_of_yaml_1_2(text: str) -> None:
    for read in (read_yaml, read_value):
        found = read(text)
        assert found == CORE[text] and type(found) is type(CORE[text])


def test_merge_keys_give_copies_and_own_keys_win(tmp_path: Path) -> None:
    raw = read_yaml(
        "base: &b {epochs: 2, deep: {x: 1}}\na: {<<: *b, epochs: 3}\nc: {<<: [*b, {epochs: 9, y: 4}]}\nd: *b"
    )
    assert raw["a"] == {"epochs": 3, "deep": {"x": 1}}
    assert raw["c"] == {"epochs": 2, "deep": {"x": 1}, "y": 4}
    raw["d"]["deep"]["x"] = 5  # what --set does to one section must not reach the others
    assert raw["base"]["deep"]["x"] == raw["a"]["deep"]["x"] == 1
    text = (
        write_yaml(tiny_settings())
        .replace("teacher:\n", "teacher: &short\n")
        .replace("student:\n", "student:\n  <<: *short\n")
    )
    path = tmp_path / "merge.yaml"
    path.write_text(text.replace("  <<: *short\n  epochs: 6\n", "  <<: *short\n"))
    config = load_config(path, ["teacher.epochs=7"])
    assert (config.teacher.epochs, config.student.epochs) == (7, 4)
    with pytest.raises(YamlError, match="`<<` must be given a mapping"):
        read_yaml("a: {<<: 3}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("my runs #1", "my runs #1"), ("#1", "#1"), ("12 #3", "12 #3"), ("a#b", "a#b"), ("'a #b'", "a #b"),
        ("{a: 'x #y'}", {"a": "x #y"}),
        ("[1.0, 2.5]", [1.0, 2.5]), ("{name: npz, path: a b}", {"name": "npz", "path": "a b"}),
    ],
)  # fmt: skip
def test_set_keeps_its_text_to_the_end(text: str, value: object) -> None:
    assert read_value(text) == value


@pytest.mark.parametrize("text", ["[a, b] # c", "[a #b, c]", "'a' #b", "{a: x} #y", "a: b #c"])
def test_set_refuses_what_a_comment_would_cut(text: str) -> None:
    with pytest.raises(YamlError, match="` #` begins a comment"):
        read_value(text)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("classifier.learning_rate=.inf", "finite number, but got inf"),
        ("classifier.learning_rate=1e999", "finite number"),
        ("classifier.weight_decay=.nan", "finite number"),
        ("tuning.space.latent_std=[1.0, .inf]", "finite number"),
        ("cluster.train={cpu: .inf}", "finite number"),
        ("teacher.epochs=9223372036854775808", "`epochs <= 1,000,000` must hold, but got"),
        ("audit.worst_case.models=1000000000", "`models <= 10,000`"),
        ("audit.shadow.models=20000", "`models <= 10,000`"),
        ("tuning.space.latent_std=[1.0, 5000]", "`latent_std <= 1,000`"),
        ("tuning.space={regeneration_rate: [1, 10000000]}", "regeneration_rate <= 1,000,000"),
        ("synthesis.sampling.standing_batches=10000000", "`standing_batches <= 1,000,000`"),
        ("students.x={kind: knowledge_recycling, "
        "synthesis: {max_draws: 10000000}}", "`max_draws <= 1,000,000`"),
        ("students.x={kind: dp_sgd, target_epsilon: .inf}", "finite number"),
        ("students.x={kind: dp_sgd, noise_multiplier: 1, epochs: 10000000}", "`epochs <="),
        ("generator={kind: edm, noise_std: 50}", "`noise_std <= 20`"),
        ("generator={kind: edm, channels: [80000]}", "`channels <= 65,536`"),
        (f"students.{LONG}={{kind: teacher}}", "at most 100 letters"),
        ("plugins=[a/b.py]", "write package.module"),
        ("plugins=['']", "must name modules"),
        ("generator.g_in=[1000000]", "`g_in <= 1,024`"),
        ("data.split_seed=-1", "split_seed"),
        ("teacher.epochs=12:30", "got '12:30' .text."),
        ("teacher.epochs=1_000", "got '1_000' .text."),
        ("teacher=12", "a whole number"),
        ("teacher=null", r"got None \(nothing\)"),
        ("data.download=no", "no and off are text in YAML 1.2: write false"),
        ("data.download=On", "yes and on are text in YAML 1.2: write true"),
        (f"name={LONG}", "at most 100 characters"),
        ('storage="a\\0b"', "one line of printable text"),
        ("storage=file://", "file:///folder"),
        (f"storage=/x/{LONG}", "255 bytes"),
        ("data={name: folder, path: \"a\\nb\"}", "one line of printable text"),
        ("audit.copies.encoder=s3://", "s3://bucket"),
    ],
)  # fmt: skip
def test_absurd_values_are_refused_before_any_work(override: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(write_yaml(tiny_settings()))
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(path, [override])
    assert "NoneType" not in str(caught.value) and "(str)" not in str(caught.value)


def every_section() -> list[Section]:
    """A whole configuration, and the sections of all kinds that it
    does not have, with their largest presets."""
    config = tiny_config(generator={"preset": "vanilla", "architecture": "kr41m"}, data={"image_size": 32})
    private = {"target_epsilon": 1.0}
    methods = [
        kind.model_validate(
            private if issubclass(kind, PrivacySection) else {"path": "set"} if name == "parquet" else {}
        )
        for name, kind in METHODS.items()
    ]
    others = [kind.model_validate(private) for kind in (DpMerfConfig, DpSgdTeacher, DpdfdTeacher)]
    return [config, EdmConfig(preset="edm64"), EdmSampling(), RunPrivacyConfig(), *others, *methods]


def test_every_limit_belongs_to_a_key_and_no_default_reaches_it() -> None:
    there: dict[str, list[object]] = {}

    def collect(section: Section) -> None:
        for name in type(section).model_fields:
            value = getattr(section, name)
            if isinstance(value, Section):
                collect(value)
            else:
                there.setdefault(name, []).extend(value if isinstance(value, tuple) else (value,))

    for section in every_section():
        collect(section)
    assert set(LARGEST) <= set(there)
    for name, largest in LARGEST.items():
        assert all(10 * abs(value) <= largest for value in there[name] if isinstance(value, (int, float))), (
            name
        )


def test_a_config_survives_its_copy_in_the_run(tmp_path: Path) -> None:
    for name in ("0o10", "1e5", "010", "null", "yes", "12", "0x1f"):
        config = parse_config(tiny_settings(name=name))
        path = tmp_path / "copy.yaml"
        path.write_text(write_yaml(config.model_dump(mode="json")))
        assert load_config(path) == config


@pytest.mark.parametrize("text", ["999999999999999999999xRTX6000", "0xT4", "9" * 5000 + "xT4", "100001xH200"])
def test_absurd_devices_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="N from 1 to 100000"):
        Devices.parse(text)


def test_locations_that_no_file_system_holds_are_refused(tmp_path: Path) -> None:
    for text in ("a\0b", "a\nb", "a\tb", os.fsdecode(b"a\xff"), LONG, "/".join(["a" * 200] * 25), "file://"):
        with pytest.raises(LocationError):
            check_location(text)
    for text in ("runs", "my runs #1", "größe/[x]", "file:///tmp/x", "s3://bucket/x"):
        assert check_location(text) == text
    (tmp_path / "file").touch()
    for path in (Path("/dev/null/x"), tmp_path / "file" / "x"):
        with pytest.raises(LocationError, match="correct `storage`"):
            make_folder(path)


def test_a_configuration_that_the_upload_leaves_out_is_refused(tmp_path: Path) -> None:
    for name in (
        "jobs/run.py",
        "runs/base/config.yaml",
        "configs/c.yaml",
        "configs/drafts/d.yaml",
        "configs/drafts/kept/e.yaml",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".gitignore").write_text("/runs/\n")
    (tmp_path / "configs" / ".rayignore").write_text("drafts\n")
    assert (
        entrypoint("run", str(tmp_path / "configs" / "c.yaml"), [], tmp_path)
        == "python jobs/run.py configs/c.yaml"
    )
    for name in ("runs/base/config.yaml", "configs/drafts/d.yaml", "configs/drafts/kept/e.yaml"):
        with pytest.raises(ConfigError, match=r"\.(git|ray)ignore.* leaves it out"):
            entrypoint("run", str(tmp_path / name), [], tmp_path)
