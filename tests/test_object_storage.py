"""The same cache in a bucket, against a real S3 endpoint (moto's server)."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import run_extract, tree_bytes
from processes import start

import fastcache
from fastcache.cache_format.manifest import Log
from fastcache.cache_format.object_storage import LEASE, ObjectStorage
from fastcache.errors import BusyError, InputError, IntegrityError, MismatchError, StorageError

pytest.importorskip("moto.server")
HOOK = "resid_post.1"


@pytest.fixture(scope="module")
def endpoint():
    """A server of its own process, so that it outlives what is killed."""
    code = (
        "from moto.server import ThreadedMotoServer as S; import sys, time; s = S('127.0.0.1', 0, verbose=False); s.start();"
        "print(*s.get_host_and_port(), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    for line in server.stdout:
        if line.split()[-1].isdigit():
            host, port = line.split()
            break
    keys = {"AWS_ACCESS_KEY_ID": "a-key", "AWS_SECRET_ACCESS_KEY": "s3cret-of-the-test", "AWS_REGION": "us-east-1"}
    before = dict(os.environ)
    os.environ.update({"AWS_ENDPOINT_URL": f"http://{host}:{port}", **keys})
    yield
    server.kill()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def bucket(endpoint, request):
    import boto3

    name = f"bucket-{abs(hash(request.node.name))}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


def objects(address):
    storage = ObjectStorage(address)
    return {name: storage.read(name) for name in sorted(storage.sizes("")) if name not in ("run.json", LEASE)}


@pytest.fixture(scope="module")
def local(tiny_qwen, chat_corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("local") / "cache"
    run_extract(tiny_qwen, chat_corpus, out)
    return out


def test_a_cache_in_a_bucket_is_the_local_one_to_the_byte(bucket, local, tiny_qwen, chat_corpus):
    run_extract(tiny_qwen, chat_corpus, f"{bucket}/caches/one")
    assert objects(f"{bucket}/caches/one") == tree_bytes(local)


def test_a_layer_is_added_to_a_cache_in_a_bucket(bucket, tiny_qwen, chat_corpus, tmp_path):
    from fastcache.progress import Silent
    from fastcache.stages.extract.add_layer import add_layers
    from fastcache.stages.extract.config import AddLayerConfig

    run_extract(tiny_qwen, chat_corpus, f"{bucket}/cache")
    add_layers(f"{bucket}/cache", AddLayerConfig((3,)), Silent())
    run_extract(tiny_qwen, chat_corpus, tmp_path / "cache", layer=(1, 3))
    assert objects(f"{bucket}/cache") == tree_bytes(tmp_path / "cache")


def test_values_read_from_a_bucket_are_the_local_ones(bucket, local, tiny_qwen, chat_corpus):
    remote = run_extract(tiny_qwen, chat_corpus, f"{bucket}/cache")
    cache = fastcache.open_cache(local)
    assert np.array_equal(remote.instance(3).residuals(HOOK), cache.instance(3).residuals(HOOK))
    numbers = np.array([5, 900, 17, cache.n_tokens - 1])
    assert np.array_equal(remote.gather(HOOK, numbers), cache.gather(HOOK, numbers))


def test_reading_rows_asks_for_their_ranges_only(bucket, tiny_qwen, chat_corpus, monkeypatch):
    run_extract(tiny_qwen, chat_corpus, f"{bucket}/cache")
    cache = fastcache.open_cache(f"{bucket}/cache")
    whole, ranges = [], []
    read, read_into = ObjectStorage.read, ObjectStorage.read_into
    monkeypatch.setattr(ObjectStorage, "read", lambda self, name, *a: (whole.append(name), read(self, name, *a))[1])
    monkeypatch.setattr(
        ObjectStorage,
        "read_into",
        lambda self, name, at, to: (ranges.append((name, len(to))), read_into(self, name, at, to)),
    )
    cache.residuals(HOOK, 300, 310)
    shard = f"parts/00000000/{HOOK}/c/0/0"
    assert not [name for name in whole if name.startswith(shard)]
    units = [size for name, size in ranges if name == shard]
    assert units[1:] == [256 * cache.d_in * 4]  # after the index, one unit


def extract_and_die(model, corpus, address):
    """Killed when the files of the second part are there, and its line isn't."""
    publish = ObjectStorage.publish

    def dying(self, workspace, name):
        publish(self, workspace, name)
        if name == "parts/00000001":
            os.kill(os.getpid(), signal.SIGKILL)

    ObjectStorage.publish = dying
    run_extract(model, corpus, address)


def test_an_extraction_into_a_bucket_that_was_killed_is_gone_on_with(bucket, local, tiny_qwen, chat_corpus):
    address = f"{bucket}/cache"
    process = start(extract_and_die, tiny_qwen, chat_corpus, address)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(Log(ObjectStorage(address)).records) == 1
    assert ObjectStorage(address).sizes("parts/00000001")
    assert LEASE in ObjectStorage(address).sizes("")
    run_extract(tiny_qwen, chat_corpus, address)
    found, expected = objects(address), tree_bytes(local)
    assert found == expected


def test_a_second_writer_is_refused_and_says_who_writes(bucket):
    first, second = ObjectStorage(f"{bucket}/cache"), ObjectStorage(f"{bucket}/cache")
    with first.lease(), pytest.raises(BusyError, match=f"process {os.getpid()}"), second.lease():
        pass
    with second.lease():
        pass


def test_a_log_that_another_writer_changed_is_not_written_over(bucket, local, tiny_qwen, chat_corpus):
    address = f"{bucket}/cache"
    run_extract(tiny_qwen, chat_corpus, address)
    first, second = (Log(ObjectStorage(address)) for _ in range(2))
    from dataclasses import replace

    record = replace(first.records[-1], index=1000)
    first.append(record)
    with pytest.raises(BusyError, match="another writer"):
        second.append(replace(record, index=1001))
    assert [one.index for one in Log(ObjectStorage(address)).records][-1] == 1000


def test_damage_in_a_bucket_is_noticed(bucket, tiny_qwen, chat_corpus):
    run_extract(tiny_qwen, chat_corpus, f"{bucket}/cache")
    storage, shard = ObjectStorage(f"{bucket}/cache"), f"parts/00000000/{HOOK}/c/0/0"
    data = bytearray(storage.read(shard))
    data[7] ^= 1
    storage.write(shard, bytes(data))
    with pytest.raises(IntegrityError, match="unit 0"):
        fastcache.open_cache(f"{bucket}/cache").residuals(HOOK, 0, 1)
    storage.write(shard, bytes(data[:-5]))
    with pytest.raises(IntegrityError, match="c/0/0 has"):
        fastcache.open_cache(f"{bucket}/cache").residuals(HOOK, 0, 1)


def test_other_settings_are_refused_and_fresh_starts_over(bucket, tiny_qwen, chat_corpus):
    from fastcache.progress import Silent
    from fastcache.stages.extract.config import ExtractConfig
    from fastcache.stages.extract.run import extract

    run_extract(tiny_qwen, chat_corpus, f"{bucket}/cache")
    with pytest.raises(MismatchError, match="unit_tokens"):
        run_extract(tiny_qwen, chat_corpus, f"{bucket}/cache", unit_tokens=5000)
    config = ExtractConfig(model=str(tiny_qwen), layer=(1,), dtype="float32", parity=0, unit_tokens=5000)
    cache = extract(config, lambda: chat_corpus, f"{bucket}/cache", Silent(), fresh=True)
    assert len(cache.parts) < 3
    assert len({name.split("/")[1] for name in ObjectStorage(f"{bucket}/cache").sizes("") if "parts/0" in name}) < 3


def test_a_foreign_folder_in_a_bucket_is_left_alone(bucket, tiny_qwen, chat_corpus):
    ObjectStorage(f"{bucket}/cache").write("thesis.txt", b"years of work")
    with pytest.raises(InputError, match="no output of fastcache"):
        run_extract(tiny_qwen, chat_corpus, f"{bucket}/cache")
    assert list(objects(f"{bucket}/cache")) == ["thesis.txt"]


def test_a_missing_bucket_is_told_without_the_credentials(endpoint, tiny_qwen, chat_corpus):
    with pytest.raises(StorageError) as caught:
        run_extract(tiny_qwen, chat_corpus, "s3://there-is-none/cache")
    assert "there-is-none" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_an_address_of_no_known_kind_is_told():
    with pytest.raises(InputError, match="no address"):
        fastcache.open_cache("carrier-pigeon://coop/cache")


def test_a_cache_in_a_bucket_is_trained_from_and_inspected(bucket, local, tiny_qwen, chat_corpus, tmp_path):
    from click.testing import CliRunner

    from fastcache.pipeline.cli import cli
    from fastcache.progress import Silent
    from fastcache.sae.storage import load_sae
    from fastcache.stages.train.config import TrainConfig
    from fastcache.stages.train.run import train

    address = f"{bucket}/cache"
    run_extract(tiny_qwen, chat_corpus, address)
    weights = []
    for name, cache in (("local", str(local)), ("remote", address)):
        train(
            TrainConfig(cache=cache, arch="standard", batch_size=128, tokens=1280, expansion=2),
            tmp_path / name,
            Silent(),
        )
        weights.append(load_sae(tmp_path / name)[0].W_dec.detach().numpy())
    assert np.array_equal(*weights)
    result = CliRunner().invoke(cli, ["inspect", address])
    assert result.exit_code == 0, result.output
    assert "complete" in result.output


def test_damage_in_a_bucket_is_found_and_repaired(bucket, local, tiny_qwen, chat_corpus):
    from fastcache.cache_format.verify import verify
    from fastcache.progress import Silent
    from fastcache.stages.extract.repair import repair

    address = f"{bucket}/cache"
    run_extract(tiny_qwen, chat_corpus, address)
    storage = ObjectStorage(address)
    assert [finding for finding in verify(storage, progress=Silent()) if not finding.is_note] == []
    shard = f"parts/00000001/{HOOK}/c/0/0"
    data = bytearray(storage.read(shard))
    data[99] ^= 8
    storage.write(shard, bytes(data))
    assert {finding.part for finding in verify(storage, progress=Silent()) if not finding.is_note} == {1}
    assert repair(address, Silent()) == [1]
    assert objects(address) == tree_bytes(local)


def test_a_store_that_does_not_answer_or_holds_nothing_is_not_damage(bucket, capsys):
    from test_cli import fails

    assert "is no cache" in fails(capsys, "verify", f"{bucket}/nothing")
    assert "the object store says" in fails(capsys, "verify", "s3://no-such-bucket-anywhere/x")
