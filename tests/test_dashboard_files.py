"""The files of the dashboard, and its server."""

import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from urllib.request import urlopen

import pyarrow.parquet as pq
import pytest
from latents import add_scores, make_results, scored
from processes import hearing_ctrl_c, ignoring_ctrl_c

from fastcache.errors import InputError, MismatchError
from fastcache.pipeline.cli import main
from fastcache.progress import Silent
from fastcache.stages.interpret.dashboard.build import build
from fastcache.stages.interpret.dashboard.serve import make_server


def ask(server, path, host=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("GET", path, headers={"Host": host or f"localhost:{server.server_port}"})
    response = connection.getresponse()
    response.read()
    return response


def test_the_server_is_for_this_machine_and_this_folder(served):
    assert served.server_address[0] == "127.0.0.1"
    assert ask(served, "/").status == 200
    assert ask(served, "/data/").status == 404
    assert ask(served, "/../../about.json").status == 404
    assert ask(served, "/%2e%2e/about.json").status == 404
    assert ask(served, "/", host="localhost").status == 200  # as a browser asks at port 80
    assert ask(served, "/", host=f"evil.example:{served.server_port}").status == 403
    assert ask(served, "/").headers["X-Content-Type-Options"] == "nosniff"


@contextmanager
def showing(latents):
    """The command as a process, and the port at which it shows the page."""
    words = ["dashboard", "--latents", latents, "--port", 0]
    code = "from fastcache.pipeline.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            shown = next(line for line in process.stdout if "http://localhost:" in line)
            yield process, int(re.search(r"localhost:(\d+)/", shown)[1])
        finally:
            process.kill()


def test_the_command_shows_the_page_until_ctrl_c(scored_latents, dashboard):
    with hearing_ctrl_c(), showing(scored_latents) as (process, port):
        with urlopen(f"http://localhost:{port}/data/index.js") as response:
            assert response.read() == (dashboard.parent / "data" / "index.js").read_bytes()
        process.send_signal(signal.SIGINT)
        assert "Stopped." in process.stdout.read()
        assert process.wait() == 0


@pytest.mark.usefixtures("dashboard")
def test_in_the_background_of_a_script_it_ends_at_sigterm(scored_latents):
    with ignoring_ctrl_c(), showing(scored_latents) as (process, port):
        process.send_signal(signal.SIGINT)
        with urlopen(f"http://localhost:{port}/") as response:
            assert response.status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait() == -signal.SIGTERM


def test_a_taken_port_is_told(served, dashboard):
    with pytest.raises(InputError, match="--port"):
        make_server(dashboard.parent, served.server_port)


def test_a_finished_dashboard_is_left_and_new_scores_are_shown(scored_latents, tmp_path, capsys):
    folder = tmp_path / "latents"
    shutil.copytree(scored_latents, folder, ignore=shutil.ignore_patterns("dashboard", "judge"))
    command = ["dashboard", "--latents", str(folder), "--no-serve"]
    main(command)
    before = (folder / "dashboard" / "index.html").stat().st_mtime_ns
    main(command)
    assert "is up to date" in capsys.readouterr().out
    assert (folder / "dashboard" / "index.html").stat().st_mtime_ns == before
    add_scores(folder, [scored(5, 3, "five")])
    main(command)
    contexts = pq.read_table(folder / "contexts.parquet")
    pq.write_table(contexts.slice(1), folder / "contexts.parquet")
    main(command)
    assert "is up to date" not in capsys.readouterr().out
    assert b"five" in (folder / "dashboard" / "data" / "index.js").read_bytes()


def test_scores_of_another_sae_are_refused(scored_latents, tmp_path):
    other = make_results(tmp_path / "other", 10)
    folder = add_scores(other, [scored(5, 3, "five")])
    with pytest.raises(MismatchError, match="another SAE"):
        build(scored_latents, folder, tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_things_is_not_touched(scored_latents, tmp_path):
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        build(scored_latents, None, tmp_path, Silent())
    assert (tmp_path / "index.html").read_text() == "mine"


def test_data_files_hold_calls_of_one_function(dashboard):
    for path in sorted((dashboard.parent / "data").glob("latents-*.js")):
        text = path.read_text()
        number, records = json.loads("[" + text.removeprefix("fastcacheLatents(").removesuffix(");\n") + "]")
        assert path.name == f"latents-{number:05}.js"
        assert len(records) == min(64, 200 - 64 * number)
