"""The runner of the pages' blocks: what is wrong in a block fails, and nothing is passed over."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("sybil")

from sybil import Example
from sybil.example import SybilFailure

from tests.docs import page, pages, shell

MADE = '```shell\necho \'{"score": 1.25, "names": ["a"]}\'\n```\n\n'


@pytest.fixture(autouse=True)
def opened() -> Iterator[page.Page]:
    page.setup({})
    yield page.current()
    page.teardown({})


def examples(text: str, folder: Path) -> list[Example]:
    (folder / "page.md").write_text(text)
    return list(pages.PAGES.parse(folder / "page.md").examples())


def run(text: str, folder: Path) -> None:
    for example in examples(text, folder):
        example.evaluate()


def test_names_and_files_flow_from_block_to_block(tmp_path: Path) -> None:
    run(
        "<!-- invisible-code-block: python\nnumber = 6\n-->\n\n```python\nnumber *= 7\n```\n\n"
        "```shell\ntouch a    # here\ntest -f a\n```\n\n```python\nassert number == 42\n```\n",
        tmp_path,
    )


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("```\nls\n```\n", "language ''"),
        ("```pyhton\nx = 1\n```\n", "language 'pyhton'"),
        ("```shell\nfalse\n```\n", "ended with 1"),
        ("```shell\ndina-lrm scoer\n```\n", "no command 'scoer'"),
        ("```shell\ntrue\ndina-lrm score \\\n  --no-such-flag\n```\n", "page.md:3"),
        ("```shell\npip install 'dina-lrm[nothing]'\n```\n", "no extra 'nothing'"),
        ("```shell\nmake coffee\n```\n", "no target 'coffee'"),
        ("```console\n$ dina-lrm --version\ndina-lrm 0.0.0.0\n```\n", "did not print 'dina-lrm 0.0.0.0'"),
        ("```console\n$ dina-lrm scoer\nno command 'scoer'\n```\n", "ended with 2"),
        (MADE + '```json\n{"score": 1.5, "names": ["a"]}\n```\n', "shows .*score as 1.5"),
        (MADE + '```json\n{"score": 1.25}\n```\n', "the page shows"),
        (MADE + '```json\n{"score": 1.25, "names": ["b"]}\n```\n', r"names\[0\] as 'b'"),
    ],
)
def test_what_is_wrong_fails(tmp_path: Path, block: str, message: str) -> None:
    with pytest.raises(SybilFailure, match=message):
        run(block, tmp_path)


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ("```python\nundefined_name\n```\n", NameError),
        ('```json\n{"a": }\n```\n', ValueError),
        ("```toml\na = \n```\n", ValueError),
        ("```yaml\na: [\n```\n", Exception),
    ],
)
def test_blocks_that_cannot_be_read_or_run_fail(tmp_path: Path, block: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        run(block, tmp_path)


def test_what_is_right_passes(tmp_path: Path) -> None:
    run(
        MADE
        + '```json\n{"score": 1.26, "names": ["a"]}\n```\n\n```text\nanything at all\n```\n\n'
        + "```shell\npip install 'dina-lrm[serve]'\nmake test\nexport WORD=hello\necho $WORD > word\n```\n\n"
        + "```console\n$ dina-lrm scoer\nerror: no command 'scoer'; there are ...\n```\n",
        tmp_path,
    )
    assert (page.current().folder / "word").read_text() == "hello\n"


def test_addresses_are_replaced_as_a_whole() -> None:
    page.current().addresses["host:8000"] = "127.0.0.1:9"
    text = "http://host:8000/x localhost:8000 host:80001"
    assert page.current().here(text) == "http://127.0.0.1:9/x localhost:8000 host:80001"


def test_options_of_accelerate_are_checked() -> None:
    words = shell.launched(["--num_processes", "8", "-m", "dina_lrm", "train", "shapes", "--resume"])
    assert words == ["python", "-m", "dina_lrm", "train", "shapes", "--resume"]
    with pytest.raises(SystemExit):
        shell.launched(["--num_procs", "8", "-m", "dina_lrm"])
