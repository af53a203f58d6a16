"""Untrusted checkpoints are loaded without running code, and refused if they could run any."""

import argparse
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_distill.teacher_cache.teachers import load_teacher
from ray_distill.teacher_cache.untrusted import StandIn, UntrustedCheckpointError, load_untrusted, plain


class Malicious:
    """Unpickling this runs a shell command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_malicious_pickle_is_refused_and_does_nothing(tmp_path: Path, zip_format: bool, protocol: int) -> None:
    touched, path = tmp_path / "touched", tmp_path / "evil.pt"
    content = {"cfg": Malicious(f"touch {touched}"), "model": {"weight": torch.zeros(2)}}
    torch.save(content, path, _use_new_zipfile_serialization=zip_format, pickle_protocol=protocol)
    for load in (load_untrusted, lambda p: load_teacher(str(p))):
        with pytest.raises(UntrustedCheckpointError, match=r"refused: its pickle names (posix|nt)\.system"):
            load(path)
    assert not touched.exists()
    torch.load(path, weights_only=False)  # This shows that the pickle runs its command.
    assert touched.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [("builtins", "eval"), ("builtins", "getattr"), ("subprocess", "Popen"), ("torch.hub", "load"), ("fairseqx", "A")],
)
def test_bare_pickles_with_other_globals_are_refused_by_name(tmp_path: Path, module: str, name: str) -> None:
    path = tmp_path / "evil.pt"
    path.write_bytes(b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X\x01\x00\x00\x001\x85R.")
    with pytest.raises(UntrustedCheckpointError, match=f"{module}.{name}|not a readable"):
        load_untrusted(path)


@pytest.mark.slow
def test_harmless_objects_come_back_inert(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    script = (
        "import sys, types, torch, argparse, collections\n"
        "module = types.ModuleType('fairseq.data.dictionary'); sys.modules['fairseq.data.dictionary'] = module\n"
        "sys.modules['fairseq'] = sys.modules['fairseq.data'] = module\n"
        "class Dictionary:\n"
        "    def __init__(self): self.symbols = ['a', 'b']\n"
        "    def __setstate__(self, state): raise SystemExit('executed')\n"
        "Dictionary.__module__ = module.__name__; module.Dictionary = Dictionary\n"
        "counts = collections.defaultdict(list); counts['x'] = [1]\n"
        "torch.save({'dictionary': Dictionary(), 'args': argparse.Namespace(arch='hubert', sizes=(1, 2)),\n"
        "            'counts': counts, 'weight': torch.ones(3)}, sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    safe_before = torch.serialization.get_safe_globals()
    checkpoint = load_untrusted(path)
    assert isinstance(checkpoint["dictionary"], StandIn)
    assert checkpoint["dictionary"].state == {"symbols": ["a", "b"]}
    assert plain(checkpoint["args"]) == {"arch": "hubert", "sizes": [1, 2]}
    assert checkpoint["counts"] == {"x": [1]}
    assert torch.equal(checkpoint["weight"], torch.ones(3))
    assert set(torch.serialization.get_safe_globals()) == set(safe_before)


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_omegaconf_configurations_become_dictionaries(tmp_path: Path, zip_format: bool) -> None:
    omegaconf = pytest.importorskip(
        "omegaconf", reason="omegaconf is not installed (it comes with the [fairseq] extra)"
    )
    path = tmp_path / "checkpoint.pt"
    content = {"model": {"_name": "hubert", "label": None, "rate": 0.5}, "task": {"normalize": True, "sizes": [1, 2]}}
    torch.save({"cfg": omegaconf.OmegaConf.create(content)}, path, _use_new_zipfile_serialization=zip_format)
    assert plain(load_untrusted(path)["cfg"]) == content


def test_namespaces_are_no_longer_real_ones(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"args": argparse.Namespace(a=1)}, path, _use_new_zipfile_serialization=False)
    assert not isinstance(load_untrusted(path)["args"], argparse.Namespace)


@pytest.mark.parametrize("keep", [0, 1, 100, 1000, -10])
@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_truncated_files_give_one_sentence(tmp_path: Path, keep: int, zip_format: bool) -> None:
    path = tmp_path / "cut.pt"
    torch.save({"model": {"w": torch.zeros(2000)}}, path, _use_new_zipfile_serialization=zip_format)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        UntrustedCheckpointError,
        match=r"cut\.pt is (not a readable PyTorch checkpoint, so it may be cut off; .*|empty; )download",
    ) as caught:
        load_untrusted(path)
    assert "\n" not in str(caught.value)


def test_an_archive_that_unpacks_to_much_more_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(1 << 20)}}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as stored, zipfile.ZipFile(tmp_path / "b.pt", "w", 8) as compressed:
        for name in stored.namelist():
            compressed.writestr(name, stored.read(name))
    assert load_untrusted(tmp_path / "a.pt")["model"]["w"].shape == (1 << 20,)
    with pytest.raises(UntrustedCheckpointError, match="b.pt is not a readable .* would unpack to 4"):
        load_untrusted(tmp_path / "b.pt")


def test_a_flipped_bit_in_a_tensor_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"w": torch.full((2000,), 0.7)}}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((50,), 0.7).numpy().tobytes()) + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        UntrustedCheckpointError, match=r"a\.ckpt is not a readable .* 'a/data/0' does not have the checksum"
    ):
        load_untrusted(path)


def test_other_files_give_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    path.write_bytes(b"RIFF and so on, not a checkpoint at all")
    with pytest.raises(UntrustedCheckpointError, match="not a readable"):
        load_untrusted(path)
    with pytest.raises(UntrustedCheckpointError, match="not a file"):
        load_untrusted(tmp_path)
    torch.save([1, 2], path)
    with pytest.raises(UntrustedCheckpointError, match="has a list, not the dictionary"):
        load_untrusted(path)
    path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(UntrustedCheckpointError, match="not a readable"):
        load_untrusted(path)


def test_plain_undoes_configurations() -> None:
    def stand_in(state: Any = None, *args: Any) -> StandIn:
        made = StandIn(*args)
        made.state = state
        return made

    node = stand_in({"_val": stand_in(None, "gelu"), "_metadata": stand_in()})
    assert plain({"model": stand_in({"_content": {"activation_fn": node}})}) == {"model": {"activation_fn": "gelu"}}
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UntrustedCheckpointError, match="nested deeper"):
        plain(loop)
