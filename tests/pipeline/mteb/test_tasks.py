"""Which tasks are chosen, what is refused by name, and what a model reads of a text."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from datasets import Dataset
from mteb._create_dataloaders import _retrieval_texts
from mteb.mocks import ALL_MOCK_TASK_TEST_GRID
from mteb.types import PromptType

from bge_ray.errors import CorpusError, SettingsError
from bge_ray.model.spec import resolve_encoder
from bge_ray.pipeline.mteb.contestants import plan_entrants
from bge_ray.pipeline.mteb.job import plan_mteb
from bge_ray.pipeline.mteb.rules import settle_rules
from bge_ray.pipeline.mteb.tasks import choose_tasks
from bge_ray.pipeline.mteb.texts import document_text, query_text
from bge_ray.settings.sections import ModelSettings, MtebSettings
from bge_ray.storage.objects import Storage
from tests.pipeline.mteb.sets import graded, known_items, untitled
from tests.support.models import make_cross_encoder, make_encoder
from tests.support.searches import settings_for
from tests.support.slow import slow

pytestmark = pytest.mark.long

CHINESE = "为这个句子生成表示以用于检索相关文章："  # noqa: RUF001 - the colon that the authors have
ENGLISH = "Represent this sentence for searching relevant passages: "


def chosen(**asked: Any) -> list[str]:
    return [task.metadata.name for task in choose_tasks(MtebSettings(**asked), Storage()).tasks]


def planned(tasks: list[str], **keys: Any) -> list[str]:
    """Return the names of the contestants; no device is looked for."""
    settings = settings_for(
        mteb__tasks=tasks, resources__gpus_per_encoder=0, rerank__gpus_per_reranker=0, **keys
    )
    return [one.name for one in plan_entrants(settings, choose_tasks(settings.mteb, Storage()).leaves())]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "set mteb.tasks, mteb.benchmark or mteb.beir"),
        ({"tasks": ("SciFakt",)}, "has no task SciFakt; did you mean SciFact"),
        ({"tasks": ("zzzzzzzzzzzz",)}, "has no task zzzzzzzzzzzz$"),
        slow(
            (
                {"benchmark": "MTEB(en, v2)"},
                r"has no benchmark MTEB\(en, v2\); did you mean .*MTEB\(eng, v2\)",
            )
        ),
        ({"tasks": ("SciFact", "MockSTSTask")}, "data of SciFact must be fetched, and HF_HUB_OFFLINE is set"),
        ({"benchmark": "MTEB(eng, v2)"}, r"the data of .* and \d+ more must be fetched"),
        ({"tasks": ("MockImageClassification",)}, "MockImageClassification is of image"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    asked: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SettingsError, match=says):
        chosen(**asked)


def test_a_filter_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    asked = settings_for(mteb__output=str(tmp_path), mteb__tasks=["MockSTSTask"], search__filter="a = 1")
    with pytest.raises(SettingsError, match=r"^search\.filter: .* leave it out"):
        plan_mteb(asked)


def test_a_hub_that_does_not_answer_is_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        SettingsError, match=r"SciFact must be fetched, and http://127\.0\.0\.1:9 does not answer"
    ):
        chosen(tasks=("SciFact",))


def test_a_task_whose_data_is_in_the_cache_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import mteb

    data = mteb.get_task("SciFact").metadata.dataset
    (tmp_path / f"datasets--{data['path'].replace('/', '--')}" / "snapshots" / data["revision"]).mkdir(
        parents=True
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert chosen(tasks=("SciFact",)) == ["SciFact"]


def test_a_folder_is_a_task_of_its_name_and_its_bytes(tmp_path: Path) -> None:
    asked = MtebSettings(beir=(str(known_items(tmp_path / "known")), str(graded(tmp_path / "graded"))))
    one, two = choose_tasks(asked, Storage()).tasks
    assert (one.metadata.name, one.eval_splits, two.eval_splits) == ("known", ["test"], ["dev"])
    one.load_data()
    split = one.dataset["default"]["test"]
    assert len(split["corpus"]) == 80
    assert len(split["queries"]) == len(split["relevant_docs"]) == 20
    before = one.metadata.revision
    corpus = tmp_path / "known" / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("the", "The", 1))
    assert choose_tasks(asked, Storage()).tasks[0].metadata.revision != before


def test_what_a_folder_lacks_is_told(tmp_path: Path) -> None:
    folder = known_items(tmp_path / "x")
    (folder / "qrels" / "test.tsv").rename(folder / "qrels" / "a.tsv")
    (folder / "qrels" / "b.tsv").write_text("")
    with pytest.raises(
        CorpusError, match=r"needs judgements in qrels/test.tsv or dev.tsv; has several \(a, b\)"
    ):
        chosen(beir=(str(folder),))
    (folder / "qrels" / "b.tsv").unlink()
    assert chosen(beir=(str(folder),)) == ["x"]
    judged = folder / "qrels" / "a.tsv"
    told = judged.read_text()
    judged.write_text("query-id\tcorpus-id\tscore\nnobody\tnothing\t1\n")
    with pytest.raises(CorpusError, match=r"no query of \S+a\.tsv is among its queries"):
        chosen(beir=(str(folder),))
    judged.write_text(told)
    with pytest.raises(SettingsError, match="several tasks are named x"):
        chosen(beir=(str(folder), str(known_items(tmp_path / "more" / "x"))))
    (folder / "queries.jsonl").unlink()
    with pytest.raises(CorpusError, match=r"has no queries\.jsonl"):
        chosen(beir=(str(folder),))


def test_texts_are_those_that_mteb_gives_its_models(tmp_path: Path) -> None:
    """Truth: mteb's own function, on its tables."""
    task = choose_tasks(MtebSettings(beir=(str(known_items(tmp_path / "k")),)), Storage()).tasks[0]
    task.load_data()
    corpora = [task.dataset["default"]["test"]["corpus"]]
    corpora.append(
        Dataset.from_list([{"id": "a", "title": "", "text": " x "}, {"id": "b", "title": " t", "text": ""}])
    )
    for corpus in corpora:
        assert [document_text(row) for row in corpus] == list(_retrieval_texts(corpus, PromptType.document))
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "what?"}]
    tables: list[list[dict[str, Any]]] = [
        [{"id": "q", "text": "plain "}],
        [{"id": "q", "text": "asked", "instruction": "and no others"}],
        [{"id": "q", "text": ["one", "two"]}],
        [{"id": "q", "text": turns}],
        [{"id": "q", "text": turns, "instruction": "be brief"}],
    ]
    for table in tables:
        queries = Dataset.from_list(table)
        assert [query_text(row) for row in queries] == list(_retrieval_texts(queries, PromptType.query))


def metadata(name: str, kind: str) -> Any:
    found = next(task.metadata for task in ALL_MOCK_TASK_TEST_GRID if task.metadata.type == kind)
    return found.model_copy(update={"name": name})


def test_rules_of_baai_and_of_mteb_differ_where_the_reference_says(tmp_path: Path) -> None:
    model = make_encoder(tmp_path / "bge-small-en-v1.5")
    spec = resolve_encoder(ModelSettings(name=str(model)), on_gpu=False)
    baai, mteb = (settle_rules(kind, spec)[0] for kind in ("baai", "mteb"))
    for name, kind, side, by_baai, by_mteb in (
        ("SciFact", "Retrieval", "query", ENGLISH, ENGLISH),
        ("SciFact", "Retrieval", "document", "", ""),
        ("ArguAna", "Retrieval", "query", "", ENGLISH),
        ("QuoraRetrieval", "Retrieval", "query", "", ENGLISH),
        ("AskUbuntuDupQuestions", "Reranking", "query", "", ENGLISH),
        ("STS12", "STS", None, "", ""),
        ("Banking77", "Classification", None, "", ""),
        (
            "BrightBiologyRetrieval",
            "Retrieval",
            "query",
            ENGLISH,
            "Represent this biology post for searching relevant passages: ",
        ),
    ):
        task = metadata(name, kind)
        assert baai.instruction(task, side) == by_baai, name
        assert mteb.instruction(task, side) == by_mteb, name
    chinese = make_encoder(tmp_path / "bge-small-zh-v1.5")
    spec = resolve_encoder(ModelSettings(name=str(chinese)), on_gpu=False)
    for kind in ("baai", "mteb"):
        rules = settle_rules(kind, spec)[0]
        assert rules.instruction(metadata("T2Reranking", "Reranking"), "query") == CHINESE


def test_who_has_nothing_to_do_is_refused_by_name(tmp_path: Path) -> None:
    cross, tiny = str(make_cross_encoder(tmp_path / "cross")), str(make_encoder(tmp_path / "tiny"))
    assert planned(["MockSTSTask", "MockRerankingTask"], mteb__models=[tiny], mteb__rerankers=[cross]) == [
        "local/tiny",
        "local/cross",
    ]
    found = planned(
        ["MockRetrievalTask"], mteb__models=[tiny], mteb__rerankers=[cross], mteb__searches=["exact", "index"]
    )
    assert found == ["local/tiny", "local/tiny+index", "local/tiny+cross"]
    with pytest.raises(SettingsError, match=r"none of .*cross can do MockSTSTask, a task of the type STS"):
        planned(["MockSTSTask"], mteb__rerankers=[cross])
    with pytest.raises(SettingsError, match=r"none of .*cross can do MockRetrievalTask, .* Retrieval"):
        planned(["MockRetrievalTask"], mteb__rerankers=[cross])
    with pytest.raises(SettingsError, match=r"mteb.rerankers: .*cross can do none of the tasks, .* STS"):
        planned(["MockSTSTask"], mteb__models=[tiny], mteb__rerankers=[cross])
    with pytest.raises(SettingsError, match=r"mteb.models: .*cross is a reranker"):
        planned(["MockSTSTask"], mteb__models=[cross])


def test_a_revision_is_that_of_weights_and_settings(tmp_path: Path) -> None:
    one, two = (make_encoder(tmp_path / name / "tiny", seed=seed) for name, seed in (("a", 1), ("b", 2)))

    def revision(model: Path, **keys: Any) -> str:
        settings = settings_for(
            mteb__tasks=["MockSTSTask"], mteb__models=[str(model)], resources__gpus_per_encoder=0, **keys
        )
        return plan_entrants(settings, choose_tasks(settings.mteb, Storage()).leaves())[0].revision

    first = revision(one)
    assert revision(one, resources__num_encoders=3, output__uri="/x", search__k=7) == first
    copy = tmp_path / "c" / "other-name"
    copy.parent.mkdir()
    one.rename(copy)
    assert revision(copy) == first
    changed = [
        revision(two),
        revision(copy, model__max_length=64),
        revision(copy, model__query_instruction="find: "),
        revision(copy, mteb__rules="mteb"),
        revision(copy, chunking__max_tokens=50),
    ]
    assert len({first, *changed}) == 6


def test_an_unjudged_query_and_a_judgement_of_no_query_are_left_out(tmp_path: Path) -> None:
    task = choose_tasks(MtebSettings(beir=(str(untitled(tmp_path / "u")),)), Storage()).tasks[0]
    task.load_data()
    assert "gone" not in task.dataset["default"]["test"]["relevant_docs"]
