"""Data of the hub is known by its revision; the hub is a server of this machine."""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest

from regdrop.experiments import build_arms
from regdrop.experiments.recording.settings import check_same_config, resolved_config
from regdrop.tasks import PRESETS
from regdrop.tasks.data_sets import digests
from regdrop.tasks.data_sets.digests import data_digests

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def nothing_known(tmp_path, monkeypatch):
    """Ask again in every test, with an empty cache and nobody at the hub's address."""
    digests._hub_revision.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    yield
    digests._hub_revision.cache_clear()


@pytest.fixture
def hub(monkeypatch):
    """Serve a data set whose revision is the last of a list; keep what was asked for."""
    asked, revisions = [], [OLD]

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            is_known = self.path.startswith("/api/datasets/some/set")
            if "/datasets/" in self.path:
                asked.append(self.path)
            self.send_response(200 if is_known else 404)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            if is_known:
                self.wfile.write(json.dumps({"id": "some/set", "sha": revisions[-1]}).encode())

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    yield asked, revisions
    server.shutdown()
    server.server_close()


def config_of(dataset):
    task = replace(PRESETS["minilm-cola"], dataset=dataset)
    return resolved_config(task, build_arms(task)["baseline"])


def test_the_revision_is_a_part_of_a_runs_settings_and_asked_for_once(hub):
    asked, _ = hub
    assert config_of("some/set")["data"] == {"revision": OLD}
    config_of("some/set")
    assert len(asked) == 1
    assert "data" not in config_of("some/other")


def test_a_changed_revision_under_a_finished_run_is_named(hub, tmp_path):
    _, revisions = hub
    found = config_of("some/set")
    check_same_config(tmp_path, found, config_of("some/set"))
    digests._hub_revision.cache_clear()
    revisions.append(NEW)
    with pytest.raises(ValueError, match=r"made with other settings \(data\.revision\)"):
        check_same_config(tmp_path, found, config_of("some/set"))


def test_without_a_connection_it_is_the_revision_in_the_cache(tmp_path):
    assert data_digests("some/set") == {}
    digests._hub_revision.cache_clear()
    folder = tmp_path / "hub" / "datasets--some--set"
    (folder / "snapshots" / NEW).mkdir(parents=True)
    (folder / "snapshots" / NEW / "README.md").touch()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(NEW)
    assert data_digests("some/set") == {"revision": NEW}


def test_finished_runs_are_read_where_the_hub_cannot_be_asked(tmp_path):
    wanted = config_of("some/set")
    check_same_config(tmp_path, {**wanted, "data": {"revision": OLD}}, wanted)


def test_what_is_not_of_the_hub_is_not_asked_for(hub):
    asked, _ = hub
    assert data_digests("digits") == data_digests("./nowhere") == data_digests("a/b/c") == {}
    assert asked == []
