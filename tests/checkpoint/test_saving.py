"""What is in a folder after saves, also after killed ones."""

import json
import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
import vits
from huggingface_hub import ModelCard, load_state_dict_from_file
from vits import Shape

import t5fx
from t5fx.atomic import replacing
from t5fx.checkpoint import save
from t5fx.checkpoint.description import CONFIG_NAME
from t5fx.errors import CheckpointError

SHAPE = Shape(depth=1)
INDEX = "model.safetensors.index.json"


def names(folder):
    return {path.name for path in folder.iterdir()}


def whole(folder, *more):
    """The names of the files that a checkpoint consists of."""
    files = json.loads((folder / CONFIG_NAME).read_text())["files"]
    return {CONFIG_NAME, INDEX, "README.md", *files, *more}


def test_the_index_is_the_one_of_the_hub(lin, tmp_path):
    t5fx.save_pretrained(lin, tmp_path, max_shard_size="4KB")
    index = json.loads((tmp_path / INDEX).read_text())
    state = lin.state_dict()
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and names(tmp_path) == whole(tmp_path) and files < names(tmp_path)
    for file in files:
        for name, tensor in load_state_dict_from_file(tmp_path / file).items():
            assert torch.equal(tensor, state[name]) and index["weight_map"][name] == file


def test_saves_remove_what_they_replace_whatever_its_shards(lin, tmp_path):
    (tmp_path / "model-mine.safetensors").touch()
    for size, adapter_only in (("4KB", False), ("1GB", False), ("2KB", True), ("4KB", False)):
        t5fx.save_pretrained(lin, tmp_path, max_shard_size=size, adapter_only=adapter_only)
    assert names(tmp_path) == whole(tmp_path, "model-mine.safetensors")
    t5fx.save_pretrained(lin, tmp_path, adapter_only=True)
    assert INDEX not in names(tmp_path)


def test_a_save_that_is_killed_leaves_the_old_checkpoint_and_the_next_one_cleans_up(lin, tmp_path):
    """Killed before each of the renames that a save consists of, and while it writes a shard."""
    t5fx.save_pretrained(lin, tmp_path)
    script = f"""
        import os, signal, sys
        import torch
        sys.path.insert(0, {os.path.dirname(vits.__file__)!r})
        from vits import Shape
        import t5fx
        from t5fx.atomic import SCRATCH
        torch.set_num_threads(1)
        model = {SHAPE!r}.model()
        load = lambda: t5fx.from_pretrained({str(tmp_path)!r}, model)
        before = load().state_dict()
        replace = os.replace

        def die():
            os.kill(os.getpid(), signal.SIGKILL)

        for moment in range(6):
            child = os.fork()
            if child == 0:
                new = load()
                new.load_state_dict({{n: t + 1 + moment for n, t in new.state_dict().items()}})
                left = iter(range(moment))

                def replaced(*names):
                    if next(left, None) is None:
                        die()
                    replace(*names)

                os.replace = replaced
                t5fx.save_pretrained(new, {str(tmp_path)!r}, max_shard_size="8KB")
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, moment
            after = load().state_dict()
            changed = {{n for n, t in after.items() if not torch.equal(t, before[n])}}
            if changed:
                assert changed == set(after), changed
                print("replaced at", moment)
                break
        assert any(name.endswith(SCRATCH) for name in os.listdir({str(tmp_path)!r}))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert run.returncode == 0 and run.stdout.startswith("replaced at"), run.stdout + run.stderr
    assert len(names(tmp_path)) > len(whole(tmp_path))
    t5fx.save_pretrained(lin, tmp_path)
    assert names(tmp_path) == whole(tmp_path)
    again = t5fx.from_pretrained(tmp_path, SHAPE.model())
    assert all(torch.equal(t, lin.state_dict()[n]) for n, t in again.state_dict().items())


def test_one_save_at_a_time_in_a_folder(tmp_path):
    order = []

    def second():
        with save._alone_in(tmp_path):
            order.append("second")

    with save._alone_in(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_other_weights_in_the_folder_are_not_touched(lin, tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001"}}))
    with pytest.raises(CheckpointError, match="give a folder of its own"):
        t5fx.save_pretrained(lin, tmp_path)
    assert names(tmp_path) == {INDEX}


def test_files_are_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(text):
        with replacing(path) as scratch:
            scratch.write_text(text)
            assert path.read_text() == "old"
            if text == "bad":
                raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write("bad")
    assert path.read_text() == "old"
    write("new")
    assert path.read_text() == "new" and names(tmp_path) == {"file"}


# --- the model card ------------------------------------------------------------------------------


def test_the_card_says_what_was_done_and_a_users_own_is_kept(lin, tmp_path):
    t5fx.save_pretrained(lin, tmp_path, base_model="someone/vit")
    path = tmp_path / "README.md"
    card = ModelCard.load(path)
    assert card.data.library_name == "t5fx" and card.data.base_model == "someone/vit"
    assert "linear-attention" in card.data.tags
    assert "1 of 1 attention sites rewritten" in card.text and "from_pretrained(" in card.text
    t5fx.save_pretrained(lin, tmp_path, base_model="someone/else")  # nobody has changed it
    assert ModelCard.load(path).data.base_model == "someone/else"
    mine = path.read_text().replace("# ViT", "# My ViT")
    path.write_text(mine)
    t5fx.save_pretrained(lin, tmp_path)
    assert path.read_text() == mine


def test_arguments_in_the_other_order_are_told(tmp_path):
    with pytest.raises(CheckpointError, match="model and a directory, in this order, got a str"):
        t5fx.save_pretrained(str(tmp_path), torch.nn.Linear(1, 1))
