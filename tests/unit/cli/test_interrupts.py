"""SIGINT and SIGTERM at any moment: the exit code, and how to go on."""

import asyncio
import json
import os
import signal
import socket
import threading

import pytest
import uvicorn
from PIL import Image

from dina_lrm.cli import main as cli
from dina_lrm.serving.running import Server, bound
from tests.unit.cli.fakes import use_brightness_model

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def hit(number):
    """This process gets the signal; Python answers it before the next line."""
    os.kill(os.getpid(), number)
    signal.sigpending()


@BOTH
def test_a_long_command_says_how_to_go_on(number, tmp_path, monkeypatch, capsys):
    model = use_brightness_model(monkeypatch)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(3 * (json.dumps({"prompt": "p", "image": "a.png"}) + "\n"))
    monkeypatch.chdir(tmp_path)
    healthy = model.score

    def struck(*arguments, **settings):
        if len(model.calls) == 1:
            hit(number)
        return healthy(*arguments, **settings)

    model.score = struck
    arguments = ["score", "--input", "rows.jsonl", "--output", "out.csv"]
    arguments += ["--rows-per-part", "1", "--batch-size", "1"]
    assert cli.main(arguments) == 128 + number
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "interrupted; what was done is kept: give the same command again, and it goes on"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    model.score = healthy
    assert cli.main(arguments) == 0
    assert "continuing after 1 of 3 rows" in capsys.readouterr().err


@BOTH
def test_while_a_command_is_imported(number, monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: hit(number))
    assert cli.main(["score"]) == 128 + number
    assert capsys.readouterr().err == "interrupted\n"


def test_a_caller_that_listens_to_sigterm_goes_on_listening(monkeypatch):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        monkeypatch.setattr(cli.importlib, "import_module", lambda name: hit(signal.SIGTERM))
        assert cli.main(["score"]) == 1  # the stand-in is no module
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


# --- servers -----------------------------------------------------------------------------------------------


def serve(on_startup, on_start):
    """A server of an empty page, by the rules of a command; whether it ever answered."""

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            on_startup()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})

    config = uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=1)
    with cli.sigterm_raised():
        server = Server(config, bound("127.0.0.1", 0), on_start)
        server.run()
    return server.answered


@BOTH
def test_before_a_server_answers_a_signal_ends_the_command(number):
    with pytest.raises(KeyboardInterrupt) as caught:
        serve(lambda: hit(number), lambda address: pytest.fail("it answers"))
    assert caught.value.args == ((number,) if number == signal.SIGTERM else ())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@BOTH
def test_a_server_that_answers_ends_well(number):
    told = []

    def up(address):
        told.append(address)
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()

    assert serve(lambda: None, up)
    assert told[0].startswith("http://127.0.0.1:")


def test_an_app_that_does_not_start(caplog):
    def fail():
        raise RuntimeError("no weights")

    assert not serve(fail, lambda address: pytest.fail("it answers"))


def test_a_bound_address_keeps_nobody_waiting():
    """Until the server is up a client is refused at once."""
    with bound("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        listener.listen()
        with pytest.raises(ValueError, match=f"--port {port}: Address already in use"):
            bound("127.0.0.1", port)


def test_answers_are_not_held_back_by_the_system():
    """asyncio turns Nagle's delay off for sockets that name their protocol, and for no others."""

    async def accepted():
        taken = asyncio.get_running_loop().create_future()
        with bound("127.0.0.1", 0) as listener:
            server = await asyncio.start_server(lambda _, writer: taken.set_result(writer), sock=listener)
            _, client = await asyncio.open_connection(*listener.getsockname())
            writer = await taken
            held_back = not writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            client.close()
            writer.close()
            server.close()
        return held_back

    assert not asyncio.run(accepted())


def test_a_second_signal_does_not_wait_for_the_app():
    def struck_twice():
        hit(signal.SIGINT)
        hit(signal.SIGINT)
        pytest.fail("it goes on")

    with pytest.raises(KeyboardInterrupt):
        serve(struck_twice, lambda address: pytest.fail("it answers"))
