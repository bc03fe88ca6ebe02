"""Checkpoints of the Hub: read from a cache as huggingface_hub lays it out, and uploaded."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from vits import Shape

import t5fx
from t5fx.checkpoint.description import CONFIG_NAME
from t5fx.errors import CheckpointError

SHAPE = Shape(depth=1)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(lin, tmp_path):
    """A cache with one revision of one repository, and the checkpoint also in a folder of it."""
    repository = tmp_path / "cache" / "models--user--vit"
    snapshot = repository / "snapshots" / COMMIT
    t5fx.save_pretrained(lin, snapshot)
    t5fx.save_pretrained(lin, snapshot / "parts" / "vit", adapter_only=True)
    for reference in ("main", "v1"):
        path = repository / "refs" / reference
        path.parent.mkdir(exist_ok=True)
        path.write_text(COMMIT)
    return tmp_path / "cache"


@pytest.mark.parametrize("about", [{}, {"revision": "v1"}, {"local_files_only": True}])
def test_a_repository_by_its_name(lin, cache, about):
    again = t5fx.from_pretrained("user/vit", SHAPE.model(), cache_dir=cache, **about)
    assert all(torch.equal(t, lin.state_dict()[n]) for n, t in again.state_dict().items())


def test_a_folder_of_a_repository(lin, cache):
    again = t5fx.from_pretrained("user/vit", SHAPE.model(), cache_dir=cache, subfolder="parts/vit")
    assert torch.equal(again.blocks[0].attn.t5.w1, lin.blocks[0].attn.t5.w1)


def test_files_are_asked_for_by_name_and_of_one_commit(cache, monkeypatch):
    asked = []
    download = huggingface_hub.snapshot_download

    def recorded(name, **about):
        asked.append((name, about["revision"], set(about["allow_patterns"]), about["token"]))
        return download(name, **about)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", recorded)
    t5fx.from_pretrained("user/vit", SHAPE.model(), cache_dir=cache, token="secret")
    (weights,) = (path.name for path in Path(cache).glob("*/snapshots/*/*.safetensors"))
    assert asked == [
        ("user/vit", None, {CONFIG_NAME, "config.json"}, "secret"),
        ("user/vit", COMMIT, {weights}, "secret"),
    ]


@pytest.mark.parametrize(
    ("name", "about", "message"),
    [
        ("user/other", {}, r"'user/other': expected a folder on this machine, or a repository"),
        ("user/vit", {"revision": "v9"}, r"at the revision 'v9', got neither"),
        ("./user/vit", {}, r"expected a folder that t5fx.save_pretrained wrote"),
        (Path("user/vit"), {}, r"expected a folder that t5fx.save_pretrained wrote"),
        ("vit", {}, r"expected a folder that t5fx.save_pretrained wrote"),
    ],
)
def test_what_is_neither_a_folder_nor_a_repository(cache, name, about, message):
    with pytest.raises(CheckpointError, match=message):
        t5fx.from_pretrained(name, SHAPE.model(), cache_dir=cache, **about)


def test_a_folder_of_that_name_comes_first(lin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    t5fx.save_pretrained(lin, "user/vit")
    assert t5fx.from_pretrained("user/vit", SHAPE.model()).blocks[0].attn.t5


class Hub:
    """The repositories of a hub as folders."""

    def __init__(self, root, monkeypatch):
        self.root, self.private, self.tokens = root, {}, set()
        for name in ("create_repo", "file_exists", "hf_hub_download", "upload_folder"):
            method = getattr(self, name)

            def call(api, *args, _method=method, **kwargs):
                self.tokens.add(api.token)
                return _method(*args, **kwargs)

            monkeypatch.setattr(huggingface_hub.HfApi, name, call)

    def create_repo(self, repo_id, *, private, exist_ok):
        name = repo_id if "/" in repo_id else f"me/{repo_id}"
        self.private.setdefault(name, private)
        (self.root / name).mkdir(parents=True, exist_ok=exist_ok)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    def file_exists(self, repo_id, name):
        return (self.root / repo_id / name).exists()

    def hf_hub_download(self, repo_id, name):
        return str(self.root / repo_id / name)

    def upload_folder(
        self, *, repo_id, folder_path, commit_message, allow_patterns, delete_patterns
    ):
        there, here = self.root / repo_id, Path(folder_path)
        for name in filter_repo_objects(
            [path.name for path in there.iterdir()], allow_patterns=delete_patterns
        ):
            (there / name).unlink()
        for name in filter_repo_objects(
            [path.name for path in here.iterdir()], allow_patterns=allow_patterns
        ):
            shutil.copy(here / name, there)


def test_uploads_hold_the_checkpoint_alone_and_keep_a_users_card(lin, tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub", monkeypatch)
    folder = tmp_path / "vit-t5"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    address = t5fx.save_pretrained(lin, folder, push_to_hub=True, token="secret", private=True)
    assert address == "https://huggingface.co/me/vit-t5" and hub.private == {"me/vit-t5": True}
    there = hub.root / "me" / "vit-t5"
    assert {p.name for p in there.iterdir()} == {p.name for p in folder.iterdir()} - {"notes.txt"}
    assert hub.tokens == {"secret"}
    (there / "README.md").write_text("Mine, written on the Hub")
    (there / "model-00001-of-00002.safetensors").touch()
    t5fx.save_pretrained(lin, folder, max_shard_size="4KB", push_to_hub=True, repo_id="me/vit-t5")
    weights = {path.name for path in folder.glob("*.safetensors")}
    of_others = {"model-00001-of-00002.safetensors"}
    found = {path.name for path in there.glob("*.safetensors")}
    assert len(weights) > 1 and found == weights | of_others
    assert (there / "README.md").read_text() == "Mine, written on the Hub"
    again = t5fx.from_pretrained(there, SHAPE.model())
    assert all(torch.equal(t, lin.state_dict()[n]) for n, t in again.state_dict().items())
