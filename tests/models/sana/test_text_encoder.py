"""Embeddings as SanaPipeline makes them; the conditions of training from either source."""

import hashlib
import json
import shutil

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import huggingface_hub
from sana_models import inputs, make_ours, make_theirs
from text_encoders import GEMMA, make_prompts, save_gemma

from mfd_fast import cli
from mfd_fast.models.order import shuffled
from mfd_fast.models.sana.text.conditions import EncodedText, StoredText, TextConditions
from mfd_fast.models.sana.text.encoder import MAX_LENGTH, load_sana_text_encoder
from mfd_fast.models.sana.text.store import TextStore, write_text_store
from mfd_fast.testing.numerics import assert_as_accurate

PROMPTS = ["A red fox ", "", "  Snow under STARS, ünïcode 🦊", "a " * 400]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    return save_gemma(tmp_path_factory.mktemp("sana"))


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return load_sana_text_encoder(checkpoint, dtype=torch.float32)


@pytest.fixture
def prompts(tmp_path):
    return make_prompts(tmp_path / "prompts.txt", 11)


class Encoded(Exception):  # noqa: N818
    """Carries out of the pipeline what it would have handed to the transformer."""


def their_embeddings(checkpoint, dtype):
    from diffusers import SanaPipeline

    pipeline = SanaPipeline.from_pretrained(
        checkpoint, vae=None, transformer=None, scheduler=None, dtype=dtype
    )
    encode = pipeline.encode_prompt

    def leave(*args, **kwargs):
        raise Encoded(*encode(*args, **kwargs))

    pipeline.encode_prompt = leave
    with pytest.raises(Encoded) as encoded:
        pipeline(PROMPTS, height=32, width=32, use_resolution_binning=False)
    return encoded.value.args


@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings_are_those_of_the_pipeline(checkpoint, dtype):
    encoder = load_sana_text_encoder(checkpoint, dtype=dtype)
    text, mask, null, null_mask = their_embeddings(checkpoint, dtype)
    ours, our_mask = encoder.encode(PROMPTS)
    assert ours.dtype == dtype and our_mask.dtype == torch.bool
    assert ours.shape == (4, MAX_LENGTH, GEMMA["hidden_size"])
    assert torch.equal(ours, text) and torch.equal(our_mask, mask.bool())
    lengths = our_mask.sum(1)
    assert torch.equal(our_mask, torch.arange(MAX_LENGTH) < lengths[:, None])  # real ones first
    assert lengths[1] < lengths[0] < lengths[3] == MAX_LENGTH
    assert torch.equal(encoder.null(), null[0, null_mask[0].bool()])
    assert len(encoder.null()) == 1  # <bos>


def test_an_encoder_that_does_not_stay_gives_the_same(checkpoint, encoder, monkeypatch):
    visiting = load_sana_text_encoder(checkpoint, dtype=torch.float32, stays=False)
    assert torch.equal(visiting.encode(PROMPTS)[0], encoder.encode(PROMPTS)[0])
    weights = dict(visiting.model.named_parameters())
    places = {name: weight.data_ptr() for name, weight in weights.items()}
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor.clone())
    with visiting._on_device():  # to another device is a copy
        assert all(weights[name].data_ptr() != place for name, place in places.items())
    assert all(weights[name].data_ptr() == place for name, place in places.items())


def test_a_stream_of_conditions_from_either_source(encoder, prompts, tmp_path):
    """The same prompts in the same calls: the same bits from the store and on the fly."""
    store = write_text_store(tmp_path / "store", prompts, encoder, batch=1, shard_size=4)
    sources = [StoredText(store), EncodedText(prompts, encoder, ahead=1)]
    stored, encoded = (TextConditions(source, batch_size=1, seed=5) for source in sources)
    for n in (0, 7, 30):
        index = shuffled(n, 11, 5)
        assert stored.indices(n) == encoded.indices(n) == [index]
        ours, theirs = stored.next_cond(n), encoded.next_cond(n)
        assert ours["text"].dtype == theirs["text"].dtype == torch.bfloat16
        assert ours["text"].shape == (1, store.lengths[index], 24)
        assert all(torch.equal(ours[name], theirs[name]) for name in ("text", "mask"))
    nulls = [c.null_cond(stored.next_cond(0)) for c in (stored, encoded)]
    assert all(torch.equal(nulls[0][name], nulls[1][name]) for name in ("text", "mask"))


@pytest.mark.parametrize("source", ["store", "on the fly"])
def test_conditions_depend_on_the_update_alone(encoder, prompts, tmp_path, source):
    def make(length):
        if source == "store":
            store = write_text_store(tmp_path / "store", prompts, encoder, batch=4, shard_size=4)
            text = StoredText(store)
        else:
            text = EncodedText(prompts, encoder, ahead=3)
        return TextConditions(text, batch_size=4, seed=1, length=length)

    conditions = make(None)
    in_order = [conditions.next_cond(n) for n in range(5)]
    assert len({cond["text"].shape[1] for cond in in_order}) > 1
    fresh = make(None)
    for n in (4, 2, 0):
        again = fresh.next_cond(n)
        assert all(torch.equal(again[name], in_order[n][name]) for name in again)
    length = max(cond["text"].shape[1] for cond in in_order)
    fixed = make(length)
    for n, cond in enumerate(in_order):
        padded, width = fixed.next_cond(n), cond["text"].shape[1]
        assert padded["text"].shape == (4, length, 24) and padded["mask"].shape == (4, length)
        assert torch.equal(padded["text"][:, :width], cond["text"])
        assert not padded["text"][:, width:].any() and not padded["mask"][:, width:].any()
    seen = [index for n in range(11) for index in conditions.indices(n)]
    assert all(sorted(seen[e * 11 : e * 11 + 11]) == list(range(11)) for e in range(4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_and_trimming_give_the_network_the_same(encoder, prompts, tmp_path, dtype):
    store = write_text_store(tmp_path / "store", prompts, encoder, batch=4, shard_size=4)
    theirs = make_theirs()
    ours, exact_network = make_ours(theirs.to(dtype)), make_ours(theirs.double())
    x, t, _ = inputs(4, dtype)
    results, exact = [], None
    for length in (None, store.longest):
        conditions = TextConditions(StoredText(store), batch_size=4, seed=0, length=length)
        cond = conditions.next_cond(2)
        for c in (cond, conditions.null_cond(cond)):
            results.append(ours(x, t, c))
        exact = exact or [exact_network(x.double(), t, c)
                          for c in (cond, conditions.null_cond(cond))]  # fmt: skip
    for trimmed, padded, reference in zip(results[:2], results[2:], exact, strict=True):
        assert_as_accurate(trimmed, padded, reference)


def test_a_length_that_does_not_fit_is_refused(encoder, prompts, tmp_path):
    store = write_text_store(tmp_path / "store", prompts, encoder, batch=4, shard_size=4)
    for length in (0, store.longest + 1):
        with pytest.raises(ValueError, match=f"must be 1 to {store.longest}, got {length}"):
            TextConditions(StoredText(store), batch_size=1, seed=0, length=length)
    for source in (StoredText(store), EncodedText(prompts, encoder, ahead=1)):
        conditions = TextConditions(source, batch_size=11, seed=0, length=3)
        with pytest.raises(ValueError, match=f"is 3, but a prompt has {store.longest} tokens"):
            conditions.next_cond(0)


@pytest.mark.parametrize("stays", [True, False])
def test_updates_get_their_rows_of_a_call(checkpoint, prompts, stays, device):
    encoder = load_sana_text_encoder(checkpoint, device=device, stays=stays)
    conditions = TextConditions(
        EncodedText(prompts, encoder, ahead=2), batch_size=2, seed=0, device=device
    )
    for n in range(5):
        cond = conditions.next_cond(n)
        chunk = [i for k in (n // 2 * 2, n // 2 * 2 + 1) for i in conditions.indices(k)]
        text, mask = encoder.encode([prompts[i] for i in chunk])
        rows = slice(n % 2 * 2, n % 2 * 2 + 2)
        width = cond["text"].shape[1]
        assert torch.equal(cond["mask"], mask[rows, :width])
        assert torch.equal(cond["text"][cond["mask"]], text[rows, :width][cond["mask"]])
        assert width == cond["mask"].sum(1).max()
        null = conditions.null_cond(cond)
        assert null["text"].shape == cond["text"].shape and null["mask"].sum(1).tolist() == [1, 1]
        assert torch.equal(null["text"][null["mask"]], encoder.null().expand(2, -1))


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


@pytest.mark.parametrize(
    ("missing", "error"),
    [
        ("tokenizer", r"tokenizer has none of \['tokenizer.json', 'tokenizer.model'\]"),
        ("text_encoder/config.json", r"text_encoder/config.json is missing"),
        ("text_encoder/model.safetensors", r"text_encoder has neither model.safetensors nor"),
    ],
)
def test_a_partial_folder_says_what_is_missing(copy, missing, error):
    path = copy / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=error):
        load_sana_text_encoder(copy)


def test_broken_files_are_refused(copy):
    weights, config = copy / "text_encoder/model.safetensors", copy / "text_encoder/config.json"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[:-1])
    with pytest.raises(
        ValueError,
        match=r"model.safetensors is not a complete safetensors file .*copy or download it again",
    ):
        load_sana_text_encoder(copy)
    weights.write_bytes(whole)
    config.write_text(json.dumps(settings | {"num_hidden_layers": 3}))  # of two types
    with pytest.raises(ValueError, match=r"text_encoder cannot be loaded .*layer_types"):
        load_sana_text_encoder(copy)
    layers = {"num_hidden_layers": 3, "layer_types": 3 * ["full_attention"]}
    config.write_text(json.dumps(settings | layers))
    with pytest.raises(ValueError, match=r"lack 11 tensors, layers\.2\."):
        load_sana_text_encoder(copy)
    config.write_text(json.dumps(settings | {"model_type": "t5"}))
    with pytest.raises(ValueError, match=r"must be of a gemma2 model, SANA's; got 't5'"):
        load_sana_text_encoder(copy)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config.json is broken"):
        load_sana_text_encoder(copy)


def test_variants_and_shards(checkpoint, encoder, tmp_path):
    """A variant is taken if the text encoder has it; shards are what transformers writes."""
    shared = {"max_shard_size": "20KB"}
    for name, options in (("bf16", {"variant": "bf16"}), ("shards", {"variant": "bf16"} | shared)):
        encoder.pipeline.save_pretrained(tmp_path / name, **options)
        other = load_sana_text_encoder(tmp_path / name, variant="bf16", dtype=torch.float32)
        assert torch.equal(other.encode(PROMPTS)[0], encoder.encode(PROMPTS)[0])
    assert len(other.checkpoint["weights"]) > 1
    plain = load_sana_text_encoder(checkpoint, variant="bf16", dtype=torch.float32)
    assert torch.equal(plain.encode(PROMPTS)[0], encoder.encode(PROMPTS)[0])


def test_a_model_id_takes_what_it_needs_from_the_cache(encoder, tmp_path, monkeypatch):
    """Offline; the text encoder has no variant, so the files without it are taken."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit, repository = "c0ffee" + 34 * "0", tmp_path / "models--owner--sana"
    save_gemma(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    cached = load_sana_text_encoder("owner/sana", variant="bf16", dtype=torch.float32)
    assert cached.describe()["checkpoint"] == "owner/sana"
    assert cached.describe()["revision"] == commit
    assert cached.encode(PROMPTS)[0].shape == encoder.encode(PROMPTS)[0].shape
    with pytest.raises(FileNotFoundError, match="'owner/other' is no local folder"):
        load_sana_text_encoder("owner/other")
    with pytest.raises(ValueError, match="belongs to a model id"):
        load_sana_text_encoder(repository, revision="main")


def command(checkpoint, folder, *options):
    prompts, store = str(folder / "prompts.txt"), str(folder / "store")
    return ["encode-prompts", str(checkpoint), "--prompts", prompts, "--out", store,
            "--device", "cpu", "--batch", "4", "--shard-size", "4", *options]  # fmt: skip


def test_command_line(checkpoint, prompts, tmp_path, capsys):
    assert cli.main(command(checkpoint, tmp_path)) == 0
    printed = capsys.readouterr().out
    store = TextStore(tmp_path / "store", verify=True)
    total = int(store.lengths.sum())
    assert f"11 prompts, {total} tokens of 24 channels, {total / 11:.1f} a prompt" in printed
    made_by = store.header["encoder"]
    assert made_by["dtype"] == "bfloat16" and made_by["checkpoint"] == checkpoint.name
    config = (checkpoint / "text_encoder/config.json").read_bytes()
    inner = hashlib.sha256(config).digest()
    assert made_by["config"] == hashlib.sha256(b"config.json\0" + inner).hexdigest()
    assert len(made_by["instruction"]) > 1 and made_by["max_length"] == MAX_LENGTH
    assert cli.main(["encode-prompts", "--check", str(store.path)]) == 0
    assert "every checksum is right" in capsys.readouterr().out
    shard = store.path / "shard-00001.bin"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    assert cli.main(["encode-prompts", "--check", str(store.path)]) == 2
    assert "shard-00001.bin is broken: its checksum differs" in capsys.readouterr().err


def test_bad_lines_and_limits_from_the_command_line(checkpoint, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_bytes(b"one\ncaf\xe9\ntwo\nthree\n")
    assert cli.main(command(checkpoint, tmp_path)) == 2
    assert "prompts.txt:2: not UTF-8" in capsys.readouterr().err
    assert cli.main(command(checkpoint, tmp_path, "--skip-bad", "--max-prompts", "2")) == 0
    assert "2 prompts" in (printed := capsys.readouterr().out)
    assert "1 bad lines skipped" in printed


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (["--batch", "0"], "--batch must be >= 1, got 0"),
        (["--dtype", "float16"], "--dtype must be one of"),
        (["--device", "tpu9"], "--device must be auto, cpu, cuda or cuda:N"),
        (["--promt-key", "x"], "unknown option"),
        (["--prompts", ""], "expected mfd-fast encode-prompts CHECKPOINT --prompts FILE"),
        (["--prompt-key", "x"], "has no keys to choose from"),
    ],
)
def test_wrong_commands(checkpoint, prompts, tmp_path, capsys, wrong, error):
    assert cli.main(command(checkpoint, tmp_path, *wrong)) == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_ctrl_c_leaves_a_store_to_go_on_with(checkpoint, prompts, tmp_path, capsys, monkeypatch):
    from mfd_fast.models.sana.text.encoder import SanaTextEncoder

    encode, calls = SanaTextEncoder.encode, []

    def interrupted(self, prompts):
        calls.append(prompts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, prompts)

    monkeypatch.setattr(SanaTextEncoder, "encode", interrupted)
    assert cli.main(command(checkpoint, tmp_path)) == 130
    assert "repeat this command to go on" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "store").iterdir()} == {
        "header.json", "null.bin", "shard-00000.bin",
    }  # fmt: skip
    assert cli.main(command(checkpoint, tmp_path)) == 0
    assert len(calls) == 4 and len(TextStore(tmp_path / "store", verify=True)) == 11


@pytest.mark.parametrize("multiple", [1, 4, 7, 500])
def test_lengths_are_multiples_from_either_source(encoder, prompts, tmp_path, multiple):
    """A few lengths, the same in a run from a store and in one that encodes as it trains."""
    store = write_text_store(tmp_path / "store", prompts, encoder, batch=1, shard_size=4)
    sources = [StoredText(store), EncodedText(prompts, encoder, ahead=1)]
    stored, encoded = (
        TextConditions(source, batch_size=2, seed=5, multiple=multiple) for source in sources
    )
    for n in range(6):
        longest = max(store.lengths[i] for i in stored.indices(n))
        ours, theirs = stored.next_cond(n), encoded.next_cond(n)
        length = min(-(-int(longest) // multiple) * multiple, 300)
        assert ours["text"].shape[:2] == theirs["text"].shape[:2] == (2, length)
        assert torch.equal(ours["mask"], theirs["mask"])
        nulls = [c.null_cond(ours) for c in (stored, encoded)]
        assert all(null["mask"].shape == (2, length) for null in nulls)
        assert torch.equal(nulls[0]["text"], nulls[1]["text"])
