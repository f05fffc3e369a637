"""`dina-lrm label`: a page on which people choose between pictures; `label export`: their votes as rows."""

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dina_lrm.cli.console import UsageError, log, print_json, print_table
from dina_lrm.cli.options import (
    JsonFlag,
    ModelOptions,
    need_packages,
    parse,
    refuse,
)
from dina_lrm.remote import TOKEN_VARIABLE
from dina_lrm.runs.pace import WorkProgress
from dina_lrm.serving.settings import LOOPBACK_NAMES, check_address, is_loopback, token_in

if TYPE_CHECKING:
    from dina_lrm.serving.labelling.export import Exported
    from dina_lrm.serving.labelling.items import Items

SHOWN = 8
"""Rejected rows that are listed one by one."""
GRACE_SECONDS = 5
"""How long requests that were accepted may take after a signal."""


@dataclass(frozen=True, kw_only=True)
class Label:
    """Collect preferences: a page that shows a prompt with two pictures and keeps what people choose.

    dina-lrm label export VOTES --output ROWS writes the votes as preference rows.
    """

    items: Annotated[Path, tyro.conf.arg(name="input", metavar="ITEMS")]
    """Rows (.jsonl, .json, .parquet) with prompt and images, image_a and image_b, or chosen and rejected; or
    a folder of NAME.txt with pictures NAME.*.png beside it."""
    output: Annotated[Path, tyro.conf.arg(metavar="VOTES")]
    """The SQLite file of votes; one that is there goes on where it stopped."""
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(
        default_factory=lambda: ModelOptions(model="none")
    )
    choose: Literal["uncertain", "random"] | None = None
    """Which pairs come first, among those with equally few votes: the ones that the reward is least sure of,
    or any. By default uncertain where --model names a reward, random where it is none."""
    raters_per_pair: int = 2
    """Votes that each pair should get."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other devices in, and then a token is wise."""
    port: int = 8080
    """0 takes any that is free."""
    hosts: tuple[str, ...] = ()
    """Names that the page is called by, such as label.example.org behind a proxy. By default any, but
    localhost alone where it listens there."""
    root_path: str = ""
    """Prefix under which a proxy offers the page, such as /label."""
    proxies: tuple[str, ...] = ()
    """Addresses or networks of proxies whose X-Forwarded-For, -Proto, -Host and -Prefix are believed."""
    seed: int = 0
    """Seed of the order of pairs and of the sides."""
    token: str | None = None
    """A secret that is asked for on the page; better given in the environment as DINA_LRM_TOKEN, which others
    cannot see. None lets everybody in."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write votes as preference rows: prompt, chosen, rejected, votes_chosen, votes_rejected, source.

    With --votes a row for each vote: prompt, left, right, choice, rater, given_at, seconds, pair, vote and
    source.
    """

    votes: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="VOTES")]
    """The SQLite file."""
    output: Annotated[Path, tyro.conf.arg(metavar="ROWS")]
    """The file of rows to write, .jsonl or .parquet."""
    items: Annotated[Path | None, tyro.conf.arg(name="input", metavar="ITEMS")] = None
    """Where the items lie, if they were moved since."""
    single: Annotated[bool, tyro.conf.arg(name="votes"), tyro.conf.FlagCreatePairsOff] = False
    """Write a row for each vote, with its rater and time, instead of one for each pair."""
    as_json: JsonFlag = False
    """Print one JSON object instead of a table."""


def main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] == "export":
        return export(parse(Export, "label export", arguments[1:]))
    options = parse(Label, "label", arguments)
    if options.model.model == "none":
        refuse(arguments, ["--pipeline", "--device", "--dtype"], "goes with --model")
    choose = options.choose or ("random" if options.model.model == "none" else "uncertain")
    if choose == "uncertain" and options.model.model == "none":
        raise UsageError(
            "--choose uncertain needs a reward: name one with --model, such as bundled or a folder"
        )
    if options.raters_per_pair < 1:
        raise UsageError(f"--raters-per-pair is at least 1; got {options.raters_per_pair}")
    check_address(
        host=options.host,
        port=options.port,
        hosts=options.hosts,
        root_path=options.root_path,
        proxies=options.proxies,
    )
    token = options.token if options.token is not None else token_in(os.environ)
    if token is not None and not token.strip():
        raise UsageError("--token is empty: give one, or none to let everybody in")
    need_packages("label", "fastapi", "uvicorn", "nltk", "pythonjsonlogger")
    from dina_lrm.serving.labelling.items import read_items

    items = read_items(options.items)
    report_rejects(items, options.output)
    log(f"pairs: {len(items.pairs)}, pictures: {len(items.pictures)}; votes go to {options.output}")
    if token is None and not is_loopback(options.host):
        log(f"warning: everybody who reaches {options.host} can see and vote; set {TOKEN_VARIABLE}")
    return serve(options, items, uncertain=choose == "uncertain", token=token)


def serve(options: Label, items: "Items", *, uncertain: bool, token: str | None) -> int:
    """Serve until SIGINT or SIGTERM; what kept the reward from saying anything is raised."""
    from dina_lrm.serving.connections import uvicorn_config
    from dina_lrm.serving.labelling.app import Labelling, create_app
    from dina_lrm.serving.labelling.estimates import Estimates
    from dina_lrm.serving.labelling.store import VoteStore
    from dina_lrm.serving.running import Server, bound
    from dina_lrm.serving.server import log_as_json

    failures: list[Exception] = []

    def give_up(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    with bound(options.host, options.port) as listener, closing(VoteStore(options.output)) as store:
        estimates = None
        if uncertain:
            progress = WorkProgress({"pairs": len(items.pairs)}, draw=False)
            estimates = Estimates(
                items,
                store,
                options.model.load,
                seed=options.seed,
                on_failure=give_up,
                on_progress=partial(progress.tell, "pairs"),
            )
        labelling = Labelling(
            items, store, raters_per_pair=options.raters_per_pair, seed=options.seed, estimates=estimates
        )
        app = create_app(
            labelling,
            token=token,
            hosts=options.hosts,
            local_hosts=(*LOOPBACK_NAMES, options.host) if is_loopback(options.host) else (),
            root_path=options.root_path,
        )

        def tell(address: str) -> None:
            place = f"{options.hosts[0] if options.hosts else address}{options.root_path}"
            log(f"{place}  (for raters); stop with Ctrl-C" + (f"; at {address}" if place != address else ""))
            log(f"{place}/results#{store.results_key}  (results, for you: raters are not to see them)")

        log_as_json()
        config = uvicorn_config(app, drain_seconds=GRACE_SECONDS, proxies=options.proxies)
        server = Server(config, listener, tell)
        try:
            if estimates is not None:
                estimates.start()
            server.run()
        finally:
            if estimates is not None:
                estimates.stop()
    if failures:
        raise failures[0]
    log(f"next: dina-lrm label export {options.output} --output rows.jsonl")
    return 0


def export(options: Export) -> int:
    """Write the rows, and print where every vote went."""
    from dina_lrm.serving.labelling.export import export_single_votes, export_votes

    if options.single:
        count = export_single_votes(options.votes, options.output, options.items)
        if options.as_json:
            print_json({"output": str(options.output), "votes": count})
        else:
            log(f"{options.output}: {count:,} votes")
        return 0
    exported = export_votes(options.votes, options.output, options.items)
    if options.as_json:
        from dataclasses import asdict

        print_json({"output": str(options.output), **asdict(exported)})
        return 0
    print_table(["", "count"], lines(exported), title=f"{options.votes} in {options.output}")
    log(f"next: dina-lrm train RECIPE --data.train {options.output}")
    return 0


def lines(exported: "Exported") -> list[tuple[str, str]]:
    """The table."""
    return [
        ("rows written", f"{exported.rows:,}"),
        ("  as many votes for either picture", f"{exported.even:,}"),
        ("pairs without a vote", f"{exported.pairs - exported.rows:,}"),
        ("raters", f"{exported.raters:,}"),
        ("votes for a picture", f"{exported.preferences:,}"),
        ("ties, half a vote for either", f"{exported.ties:,}"),
        ("skips, in no row", f"{exported.skips:,}"),
    ]


def report_rejects(items: "Items", votes: Path) -> None:
    """Rows that give no pair, and pictures that are not there: the first ones here, all of them in a file
    beside the votes."""
    from dina_lrm.data.pairs import write_rejects

    if not items.rejects:
        return
    file = votes.with_suffix(".rejects.jsonl")
    write_rejects(items.rejects, file)
    log(f"rows or pictures left out: {len(items.rejects)}, listed in {file}")
    for reject in items.rejects[:SHOWN]:
        log(f"  {reject.file}, row {reject.row}: {reject.reason}")
