"""Settings: what is refused, with which words, and that the documentation names every key."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bge_ray.errors import SettingsError
from bge_ray.settings.sections import Settings, known_keys, parse_settings, settings_help

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
KEYS = [key for key, *_ in known_keys()]


def test_defaults_need_no_document() -> None:
    assert parse_settings(None) == Settings()
    assert parse_settings("") == Settings()


def test_overrides_win_over_the_document() -> None:
    settings = parse_settings(
        "model: {max_length: 64}\ncorpus: {uri: a}", ["model.max_length=32", "corpus.uri=b"]
    )
    assert (settings.model.max_length, settings.corpus.uri) == (32, "b")
    assert settings.model.outputs == ("embedding",)
    assert parse_settings("", ["model.outputs=sparse"]).model.outputs == ("sparse",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.max_len=3", "did you mean model.max_length"),
        ("corpus.token_budget=3", "did you mean batching.token_budget"),
        ("modle.name=x", "did you mean model.name"),
        ("batching.zzzz=1", "--help lists every key"),
        ("model.max_length=many", "model.max_length"),
        ("model.max_length=2", "greater than or equal to 3"),
        ("batching.token_budget=0", "token_budget"),
        ("corpus.max_rejected_fraction=1.5", "less than or equal to 1"),
        ("corpus.keep_columns=[embedding]", "our own columns"),
        ("corpus.keep_columns=[a, a]", "named twice"),
        ("output.dtype=int8", "output.dtype"),
        ("model.outputs=[]", "at least 1 item"),
        ("model.outputs=[sparse, sparse]", "one is named twice"),
        ("model.outputs=[embedding, dense]", r"model.outputs: .*'sparse'.*got 'dense'"),
        ("name=x", "expected section.key=value"),
        ("model.name", "expected section.key=value"),
        ("model.max_length={", "not valid YAML"),
        ("corpus.uri=s3:/bucket/corpus", r"corpus.uri: one slash is missing: s3://"),
        ("evaluate.run=[a, 's3:/b']", r"evaluate.run: one slash is missing"),
        ("corpus.uri=", r"corpus.uri: is empty"),
        ("chunking.max_tokens={a: 1, a: 2}", r"a stands twice, first in line 1"),
        ("resources.num_encoders=true", r"resources.num_encoders: true is no value of it"),
        ("output.dtype=yes", r"output.dtype: true is no value of it"),
    ],
)
def test_a_wrong_setting_is_refused_with_the_way_out(override: str, message: str) -> None:
    with pytest.raises(SettingsError, match="(?s)" + message):
        parse_settings(None, [override])


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            "corpus:\n  uri: a\nmodel:\n  name: b\ncorpus:\n  format: csv\n",
            "corpus stands twice.*line 1.*line 5",
        ),
        ("corpus:\n  uri: a\n  format: csv\n  uri: b\n", "uri stands twice.*line 2.*line 4"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(document: str, message: str) -> None:
    """Of two sections YAML's readers take the last, and what the first one said would be gone."""
    with pytest.raises(SettingsError, match="(?s)" + message):
        parse_settings(document)


def test_what_a_section_merges_in_it_may_say_anew() -> None:
    base = "&base {uri: /a, text_column: body}"
    twice = f"corpus: {base}\nmine: {{output: /m}}\n"
    assert parse_settings(twice).corpus.uri == "/a"
    merged = f"corpus:\n  <<: {base}\n  uri: /b\n"
    assert (parse_settings(merged).corpus.uri, parse_settings(merged).corpus.text_column) == ("/b", "body")


@pytest.mark.parametrize(
    "text",
    [
        "/data/run #3",
        "Document text: ",
        " leading",
        "Represent this sentence for searching relevant passages: ",
        "*.jsonl",
        "s3://bucket/[ab]*.jsonl",
        "007",
        "1e3",
        "yes",
        "2026-01-01",
        "{brace",
        "'open",
        "a: b",
        "C:/data",
        "host:9000/x",
    ],
)
def test_a_text_stands_as_it_was_given(text: str) -> None:
    for key in ("corpus.uri", "model.passage_instruction", "corpus.id_column", "model.revision"):
        section, _, name = key.partition(".")
        assert getattr(getattr(parse_settings(None, [f"{key}={text}"]), section), name) == text


@given(st.text().filter(lambda text: text not in ("null", "~") and text[:1] not in ("'", '"')))
def test_any_instruction_comes_through_whole(text: str) -> None:
    try:
        settings = parse_settings(None, [f"model.query_instruction={text}"])
    except SettingsError as error:
        assert "credentials" in str(error)
    else:
        assert settings.model.query_instruction == text


def test_quotes_and_null_are_taken_as_such() -> None:
    settings = parse_settings(
        "model: {query_instruction: x}",
        ["model.query_instruction=null", "corpus.id_column=' #1 '", "model.passage_instruction="],
    )
    assert settings.model.query_instruction is None
    assert settings.corpus.id_column == " #1 "
    assert settings.model.passage_instruction == ""


def test_one_value_stands_for_a_list_of_one() -> None:
    settings = parse_settings(None, ["evaluate.k=10", "corpus.keep_columns=lang", "evaluate.run=a"])
    assert settings.evaluate.k == (10,)
    assert settings.corpus.keep_columns == ("lang",)
    assert settings.evaluate.run == "a"
    assert parse_settings(None, ["evaluate.run=[a, b]"]).evaluate.run == ("a", "b")
    assert parse_settings(None, ["evaluate.run=a #1"]).evaluate.run == "a #1"


@pytest.mark.parametrize("document", ["- a list", "corpus: 7", "{", "model: {name: x}\nmodle: {}"])
def test_a_document_of_another_shape_is_refused(document: str) -> None:
    with pytest.raises(SettingsError):
        parse_settings(document)


def test_required_keys_are_all_named() -> None:
    with pytest.raises(SettingsError, match=r"corpus\.uri, output\.uri"):
        Settings().require("corpus.uri", "model.name", "output.uri")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().model.name = "x"  # type: ignore[misc]


@given(st.text(st.characters(categories=["Ll"]), min_size=1, max_size=12), st.text(min_size=0, max_size=5))
def test_any_key_is_known_or_refused(name: str, value: str) -> None:
    if f"model.{name}" not in KEYS:
        with pytest.raises(SettingsError):
            parse_settings(None, [f"model.{name}={value}"])


def test_help_lists_every_key_with_its_meaning() -> None:
    text = settings_help()
    for key, _, _, meaning in known_keys():
        assert key in text
        assert len(meaning) > 10


# Keys without a default that would make sense, which a config shows an example of.
EXAMPLES = {
    "corpus.uri",
    "output.uri",
    "search.queries",
    "search.output",
    "rerank.candidates",
    "rerank.output",
}
EXAMPLES |= {"mine.queries", "mine.qrels", "mine.output", "merge.models", "merge.output"}
EXAMPLES |= {"train.data", "train.output"}
EXAMPLES |= {"mteb.benchmark", "mteb.output"}
EXAMPLES |= {"evaluate.run", "evaluate.qrels", "evaluate.output", "index.queries"}
EXAMPLES |= {"migrate.pointer", "migrate.output"}


def test_the_configs_name_every_key_and_say_the_defaults() -> None:
    named = set()
    defaults = Settings()
    for path in sorted(CONFIGS.glob("*.yaml")):
        settings = parse_settings(path.read_text())
        for section, keys in yaml.safe_load(path.read_text()).items():
            for name in keys:
                named.add(f"{section}.{name}")
                if f"{section}.{name}" not in EXAMPLES:
                    given = getattr(getattr(settings, section), name)
                    assert given == getattr(getattr(defaults, section), name), (
                        f"{path.name}: {section}.{name}"
                    )
    assert named == set(KEYS)


def test_variables_of_the_environment_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGE", "night")
    monkeypatch.setenv("ROOT", "s3://bucket")
    document = "corpus:\n  uri: ${ROOT}/${STAGE}/corpus\n  keep_columns: ['${STAGE}']\n"
    settings = parse_settings(document, ["output.uri=${ROOT}/out", "model.query_instruction=cost: $5 $${X} "])
    assert settings.corpus.uri == "s3://bucket/night/corpus"
    assert settings.corpus.keep_columns == ("night",)
    assert settings.output.uri == "s3://bucket/out"
    assert settings.model.query_instruction == "cost: $5 ${X} "


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("${NOT_THERE}/x", "the environment has no variable NOT_THERE"),
        ("${}/x", "is no variable"),
        ("${a b}", "is no variable"),
        ("${AWS_SECRET_ACCESS_KEY}", "is a secret by its name"),
        ("${HF_TOKEN}", "is a secret by its name"),
        ("${LOGIN}", "holds a URI with credentials"),
    ],
)
def test_a_variable_that_cannot_be_filled_in_is_refused(
    value: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "canary-of-the-environment"
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("LOGIN", f"https://user:{secret}@host/x")
    for way in ({"overrides": [f"corpus.uri={value}"]}, {"document": f"corpus:\n  uri: '{value}'\n"}):
        with pytest.raises(SettingsError, match=says) as caught:
            parse_settings(way.get("document"), way.get("overrides", ()))
        assert secret not in str(caught.value)
        assert "corpus.uri" in str(caught.value)


def test_a_rule_over_several_keys_names_them() -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(None, ["search.candidates=3"])
    assert str(caught.value).startswith("impossible setting: search.candidates: ")
    assert "Value error" not in str(caught.value) and "{" not in str(caught.value)
