"""Rows with images and sounds: their tokens and pixels against the model's own processor, and whatever is refused."""

from __future__ import annotations

import base64
import io
import pickle
import threading
import wave
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ftrun.data import Data, TooLong, TrainOn
from ftrun.data.formats import understand
from ftrun.data.rows import BadRow, Row
from ftrun.errors import ConfigError, Problem
from ftrun.template import Template
from ftrun.worker import batches
from ftrun.worker import sequence as sequences
from ftrun.worker.batches import IGNORED
from ftrun.worker.encode import RowEncoder, TooLongRow
from ftrun.worker.media import encoders, images, processor, sounds, videos
from ftrun.worker.media.errors import UnreadableMedium
from ftrun.worker.media.place import Located
from ftrun_plugins.stage.sft import SFT
from tests import vision_models

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what gives the folder of a family's tiny model."""
    made: dict[str, Path] = {}

    def folder(family: str) -> str:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            {**vision_models.IMAGES, "qwen2_audio": vision_models.qwen2_audio}[family](made[family])
        return str(made[family])

    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder with a file of rows and two images, one of which a camera took lying."""
    gradient = np.linspace(0, 255, 32 * 40 * 3).reshape(32, 40, 3).astype(np.uint8)
    Image.fromarray(gradient).save(tmp_path / "a.png")
    lying = Image.fromarray(gradient[:, :24])
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(tmp_path / "b.jpg", exif=exif)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return tmp_path


def encoder(tokenizer: Any, template: Template | None = None, **data: Any) -> RowEncoder:
    cfg = SimpleNamespace(
        data=Data(**data), template=template or Template(), stage=SimpleNamespace(rows="conversations")
    )
    return RowEncoder(cfg, tokenizer)  # type: ignore[arg-type]


def row(folder: Path, value: dict[str, Any]) -> Row:
    return Row(value, str(folder / "rows.jsonl"), 3)


def encoded(tokenizer: Any, folder: Path, value: dict[str, Any], template: Template | None = None, **data: Any) -> Any:
    """Return what becomes of a row; it must be one."""
    (found,) = encoder(tokenizer, template, **data).encode(understand(row(folder, value), "conversations"))
    return found


def trained(found: Any, **more: Any) -> dict[str, Any]:
    """Return a tokenised row as a data set gives it."""
    (sequence,) = found.sequences
    arrays: dict[str, Any] = sequences.arrays(sequence.ids, sequence.spans, None, sequence.labels)
    return arrays | ({"media": found.media, "place": found.row.place} if found.media else {}) | more


def batch_of(tokenizer: Any, *rows: dict[str, Any]) -> batches.Batch:
    return batches.padding_collator(0, processor.of(tokenizer))(rows)


TWO = {
    "messages": [
        {"role": "user", "content": "what<image> colour<image>"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "blue"},
    ],
    "images": ["a.png", "b.jpg"],
}
ONE = {
    "messages": [{"role": "user", "content": "<image>what"}, {"role": "assistant", "content": "it is red"}],
    "images": ["a.png"],
}
TEXT = {"messages": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "it"}]}


def whole_text(tokenizer: Any) -> str:
    """Return the conversation `TWO` as the processor's own chat template writes it."""
    parts = ["what", None, " colour", None]
    content = [{"type": "text", "text": part} if part else {"type": "image"} for part in parts]
    messages = [{"role": "user", "content": content}]
    for message in TWO["messages"][1:]:
        messages.append({"role": message["role"], "content": [{"type": "text", "text": message["content"]}]})
    return processor.of(tokenizer).processor.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("family", vision_models.IMAGES)
def test_a_batch_is_what_the_models_own_processor_makes_of_the_conversation(family, models, pictures):
    tokenizer = processor.load_tokenizer(models(family), {})
    found = encoded(tokenizer, pictures, TWO)
    batch = batch_of(tokenizer, trained(found), trained(encoded(tokenizer, pictures, TEXT)))
    loaded = [[images.load(str(pictures / name)) for name in ("a.png", "b.jpg")]]
    own = processor.of(tokenizer).processor
    expected = own(text=[whole_text(tokenizer)], images=loaded, add_special_tokens=False, return_tensors="pt")
    length = expected["input_ids"].shape[1]
    assert batch["input_ids"][0].tolist() == expected["input_ids"][0].tolist()
    assert length == len(found.sequences[0].ids) + found.grown  # planned from the images' headers alone
    assert batch["attention_mask"].sum(1).tolist() == [length, int(batch["attention_mask"][1].sum())]
    learned = tokenizer.decode(batch["labels"][0][batch["labels"][0] != IGNORED])
    end = tokenizer.eos_token
    assert learned == f"red{end}blue{end}"
    model = processor_model(models(family))
    with torch.no_grad():
        logits = model(**batches.model_inputs(batch)).logits[0]
        wanted = model(
            **{name: value for name, value in expected.items() if name != "token_type_ids"}
            | ({"token_type_ids": expected["token_type_ids"]} if family == "gemma3" else {})
        ).logits[0]
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)


def processor_model(folder: str) -> Any:
    from transformers import AutoModelForMultimodalLM

    return AutoModelForMultimodalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics3", "gemma3"])
def test_rows_in_one_batch_do_not_change_each_other(family, models, pictures):
    tokenizer = processor.load_tokenizer(models(family), {})
    rows = [trained(encoded(tokenizer, pictures, value)) for value in (TEXT, TWO, ONE)]
    model = processor_model(models(family))
    with torch.no_grad():
        together = model(**batches.model_inputs(batch_of(tokenizer, *rows))).logits
        for number, each in enumerate(rows):
            alone = model(**batches.model_inputs(batch_of(tokenizer, each))).logits[0]
            torch.testing.assert_close(together[number, : len(alone)], alone, atol=1e-5, rtol=1e-4)


def test_a_batch_without_media_has_nothing_of_media(models, pictures):
    tokenizer = processor.load_tokenizer(models("qwen2_vl"), {})
    assert set(batch_of(tokenizer, trained(encoded(tokenizer, pictures, TEXT)))) == {
        "input_ids", "labels", "attention_mask",
    }  # fmt: skip


@pytest.mark.parametrize("train_on", list(TrainOn))
def test_the_tokens_of_an_image_are_never_learned(train_on, models, pictures):
    tokenizer = processor.load_tokenizer(models("qwen2_vl"), {})
    roles = ["user"] if train_on is TrainOn.roles else []
    found = encoded(tokenizer, pictures, ONE, train_on=train_on, train_roles=roles)
    batch = batch_of(tokenizer, trained(found, weights=np.full(len(found.sequences[0].ids), 0.5, np.float32)))
    image = batch["mm_token_type_ids"] == 1
    assert image.sum() == 20
    assert (batch["labels"][image] == IGNORED).all()
    assert (batch["labels"] != IGNORED).any()
    assert batch["weights"].shape == batch["labels"].shape


def test_a_named_template_writes_an_image_as_the_models_own_does(models, pictures):
    tokenizer = processor.load_tokenizer(models("qwen2_vl"), {})
    chosen = Template(
        user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n", assistant="{content}<|im_end|>\n"
    )
    found = encoded(tokenizer, pictures, TWO, chosen)
    own = encoded(tokenizer, pictures, TWO)
    assert found.sequences[0].ids == own.sequences[0].ids


def test_images_turned_by_their_camera_are_turned_back(pictures):
    assert images.size(str(pictures / "b.jpg")) == (24, 32)
    assert images.load(str(pictures / "b.jpg")).size == (32, 24)
    assert images.load((pictures / "a.png").read_bytes()).mode == "RGB"


def png(**save: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 32), "red").save(out, "PNG", **save)
    return out.getvalue()


def test_images_in_a_row_as_bytes_and_as_data_addresses(models, pictures):
    tokenizer = processor.load_tokenizer(models("qwen2_vl"), {})
    given = [{"bytes": png(), "path": None}, f"data:image/png;base64,{base64.b64encode(png()).decode()}"]
    one, other = (encoded(tokenizer, pictures, ONE | {"images": [each]}) for each in given)
    assert one.media == other.media == [Located("image", (png(),), size=(32, 40), num_tokens=20)]


def outside(folder: Path) -> str:
    path = folder.parent / "secret.png"
    path.write_bytes(png())
    return str(path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing.png", "an image that is not there"),
        (".", "an image that is not a file"),
        ("rows.jsonl", "an image that cannot be read: no image of a known format"),
        ("../secret.png", "an image outside data.media_folder"),
        ("/etc/hostname", "an image outside data.media_folder"),
        ("https://example.invalid/a.png", "by an address, which is not fetched unasked"),
    ],
)
def test_what_cannot_be_used_is_a_bad_row_with_its_place(name, says, models, pictures):
    tokenizer = processor.load_tokenizer(models("qwen2_vl"), {})
    outside(pictures)
    found = encoded(tokenizer, pictures, ONE | {"images": [name]})
    assert isinstance(found, BadRow)
    assert found.problem.key == f"{pictures}/rows.jsonl:3"
    assert says in found.problem.message
    assert "data." in found.problem.fix or "whole file" in found.problem.fix
    assert str(pictures / name) not in found.reason  # rows are counted by reason


def test_any_file_is_read_where_the_config_says_so(models, pictures):
    tokenizer = processor.load_tokenizer(models("qwen2_vl"), {})
    path = outside(pictures)
    assert encoded(tokenizer, pictures, ONE | {"images": [path]}, media_folder="/").media[0].sources == (path,)
    inside = str(pictures / "a.png")
    assert encoded(tokenizer, pictures, ONE | {"images": [inside]}).media[0].sources == (inside,)


def test_a_link_in_the_folder_is_followed(models, pictures):
    tokenizer = processor.load_tokenizer(models("qwen2_vl"), {})
    (pictures / "link.png").symlink_to(outside(pictures))
    assert encoded(tokenizer, pictures, ONE | {"images": ["link.png"]}).media[0].size == (32, 40)


def test_addresses_are_fetched_if_that_is_allowed(models, pictures, monkeypatch):
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(png() if self.path == "/a.png" else b"")

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tokenizer = processor.load_tokenizer(models("qwen2_vl"), {})
    address = f"http://127.0.0.1:{server.server_port}"

    def fetched(name: str) -> Any:
        return encoded(tokenizer, pictures, ONE | {"images": [f"{address}/{name}"]}, media_urls=True)

    assert fetched("a.png").media[0].sources == (png(),)
    assert "cannot be fetched" in fetched("b.png").problem.message
    monkeypatch.setattr("ftrun.worker.media.place.MOST_BYTES", 10)
    assert "of more than 0 MiB" in fetched("a.png").problem.message
    server.shutdown()
    file = encoded(tokenizer, pictures, ONE | {"images": ["ftp://127.0.0.1/a.png"]}, media_urls=True)
    assert "an address of another kind" in file.problem.message


def test_placeholders_and_media_must_agree(models, pictures):
    tokenizer = processor.load_tokenizer(models("qwen2_vl"), {})
    written = {"messages": [{"role": "user", "content": "<|image_pad|>"}, TEXT["messages"][1]]}
    as_text = encoded(tokenizer, pictures, written)
    assert 5 not in as_text.sequences[0].ids  # a special token in a row's own text is text
    found = encoded(tokenizer, pictures, written, control_tokens_in_text=True)
    assert "1 image in the text for none" in found.problem.message
    silent = Template(chat_template="{% for m in messages %}{{ m['role'] }}{% endfor %}")
    tokenizer.chat_template = silent.chat_template
    found = encoded(tokenizer, pictures, ONE, silent)
    assert isinstance(found, BadRow)


def test_media_are_refused_by_a_model_of_text(pictures):
    from ftrun.worker import builtin

    found = encoded(builtin.tokenizer(), pictures, ONE)
    assert "the model takes text alone" in found.problem.message


def test_a_kind_that_the_processor_does_not_take_is_refused(models, pictures):
    tokenizer = processor.load_tokenizer(models("llava"), {})
    found = encoded(tokenizer, pictures, ONE | {"images": None, "audios": ["a.wav"]} | {"messages": TEXT["messages"]})
    assert "a medium (audio) that the model's processor does not take: it takes image" in found.problem.message


LONG = {"messages": [{"role": "user", "content": "<image>" + "what " * 60}, TEXT["messages"][1]], "images": ["a.png"]}


def test_the_tokens_of_media_count_as_length_and_a_cut_never_takes_one(models, pictures):
    tokenizer = processor.load_tokenizer(models("qwen2_vl"), {})
    full = encoded(tokenizer, pictures, LONG, max_length=400)
    length = len(full.sequences[0].ids) + 19
    assert not encoded(tokenizer, pictures, LONG, max_length=length).truncated
    cut = encoded(tokenizer, pictures, LONG, max_length=length - 1)
    assert cut.truncated
    assert batch_of(tokenizer, trained(cut))["input_ids"].shape[1] <= length - 1
    assert isinstance(encoded(tokenizer, pictures, LONG, max_length=length - 1, too_long=TooLong.drop), TooLongRow)
    found = encoded(tokenizer, pictures, LONG, max_length=22)
    assert "would lose a part of its media" in found.problem.message


def test_a_row_longer_than_the_model_takes_is_an_error_with_its_place(models, pictures):
    tokenizer = processor.load_tokenizer(models("qwen2_vl"), {})
    found = trained(encoded(tokenizer, pictures, ONE))
    media = processor.of(tokenizer)
    media.max_length = 12
    with pytest.raises(UnreadableMedium, match=r"rows.jsonl:3: has \d+ tokens with its media, and the model takes 12"):
        batch_of(tokenizer, found)


def test_an_image_that_is_not_whole_is_an_error_with_its_place(models, pictures):
    tokenizer = processor.load_tokenizer(models("qwen2_vl"), {})
    whole = (pictures / "b.jpg").read_bytes()
    (pictures / "torn.jpg").write_bytes(whole[:-60])
    found = trained(encoded(tokenizer, pictures, ONE | {"images": ["torn.jpg"]}))
    with pytest.raises(UnreadableMedium) as raised:
        batch_of(tokenizer, found)
    assert raised.value.problems[0].key.endswith("rows.jsonl:3")
    assert "torn.jpg" in raised.value.problems[0].message


def _raise_unreadable(_: Any) -> None:
    raise UnreadableMedium(Problem("rows.jsonl:3", "has an image: that is bad", "another"))


def test_an_error_in_a_data_worker_keeps_its_problem():
    loader = torch.utils.data.DataLoader([1], collate_fn=_raise_unreadable, num_workers=1)
    with pytest.raises(ConfigError) as raised:
        list(loader)
    expected = (Problem("rows.jsonl:3", "has an image: that is bad", "another"),)
    assert raised.value.problems == expected
    assert pickle.loads(pickle.dumps(raised.value)).problems == expected


def sound(rate: int = 16000, seconds: float = 0.5, width: int = 2) -> bytes:
    out = io.BytesIO()
    samples = np.sin(np.arange(int(rate * seconds)) / 9)
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes((samples * (2 ** (8 * width - 1) - 1)).astype(f"<i{width}").tobytes())
    return out.getvalue()


def test_sounds(models, pictures):
    tokenizer = processor.load_tokenizer(models("qwen2_audio"), {})
    (pictures / "a.wav").write_bytes(sound())
    value = {
        "messages": [{"role": "user", "content": "<audio>what is it"}, {"role": "assistant", "content": "it is red"}],
        "audios": ["a.wav"],
    }
    batch = batch_of(tokenizer, trained(encoded(tokenizer, pictures, value)))
    own = processor.of(tokenizer).processor
    user, reply = "<|audio_bos|><|AUDIO|><|audio_eos|>what is it", "it is red"
    text = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{reply}<|im_end|>\n"
    loaded = sounds.load(sound())
    expected = own(text=[text], audio=[loaded.samples], sampling_rate=16000, return_tensors="pt")
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    assert (expected["input_ids"] == 7).sum() > 1
    torch.testing.assert_close(batch["input_features"], expected["input_features"])
    assert torch.isfinite(processor_model(models("qwen2_audio"))(**batches.model_inputs(batch)).logits).all()
    (pictures / "a.wav").write_bytes(sound(rate=8000))
    with pytest.raises(UnreadableMedium, match="8000 samples a second, and the model takes 16000"):
        batch_of(tokenizer, trained(encoded(tokenizer, pictures, value)))


@pytest.mark.parametrize(("width", "tolerance"), [(2, 1e-4), (4, 1e-6)])
def test_a_wav_file_is_read_sample_by_sample(width, tolerance):
    found = sounds.load(sound(width=width))
    assert found.rate == 16000
    np.testing.assert_allclose(found.samples, np.sin(np.arange(8000) / 9), atol=tolerance)
    with pytest.raises(ValueError, match="no WAV file"):
        sounds.look(b"not a sound at all")


def test_a_video_of_frames(pictures):
    frames = pictures / "clip"
    frames.mkdir()
    for number in range(3):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(frames / f"{number}.png")
    found = videos.load(sorted(map(str, frames.iterdir())), frames=True)
    assert found.frames.shape == (3, 6, 8, 3)
    assert found.frames[:, 0, 0, 0].tolist() == [0, 1, 2]
    Image.new("RGB", (9, 6)).save(frames / "3.png")
    with pytest.raises(ValueError, match="several sizes"):
        videos.load(sorted(map(str, frames.iterdir())), frames=True)


VIDEO = {"messages": [{"role": "user", "content": "<video>what"}, TEXT["messages"][1]], "videos": ["clip"]}


def clip(folder: Path) -> np.ndarray[Any, Any]:
    """Write a video as a folder of frames, and return them."""
    (folder / "clip").mkdir()
    frames = np.stack([np.full((32, 40, 3), 40 * number, np.uint8) for number in range(4)])
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / "clip" / f"{number}.png")
    return frames


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_videos_with_torchvision(family, models, pictures):
    pytest.importorskip("torchvision")
    tokenizer = processor.load_tokenizer(models(family), {})
    frames, media = clip(pictures), processor.of(tokenizer)
    batch = batch_of(tokenizer, trained(encoded(tokenizer, pictures, VIDEO)))
    user, reply = "<|vision_start|><|video_pad|><|vision_end|>what", "it"
    text = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{reply}<|im_end|>\n"
    expected = media.processor(text=[text], videos=[frames], do_sample_frames=False, return_tensors="pt")
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    torch.testing.assert_close(batch["pixel_values_videos"], expected["pixel_values_videos"])
    assert torch.isfinite(processor_model(models(family))(**batches.model_inputs(batch)).logits).all()
    (expansion,), more = media.expand("video", [videos.Video(frames, fps=2.0)])
    assert len(expansion.ids) >= 4
    assert more["video_grid_thw"].shape == (1, 3)


def test_videos_without_torchvision_are_refused(models, pictures):
    tokenizer = processor.load_tokenizer(models("qwen2_vl"), {})
    if "video" in processor.of(tokenizer).tokens:
        pytest.skip("torchvision is installed")
    clip(pictures)
    found = encoded(tokenizer, pictures, VIDEO)
    assert "it takes image, for want of the package torchvision" in found.problem.message


@pytest.mark.parametrize("family", vision_models.IMAGES)
def test_the_parts_that_only_media_go_through(family, models):
    model = processor_model(models(family))
    found = encoders.parameters(model)
    assert found
    assert all(any(part in name for part in ("visual", "vision", "projector", "connector")) for name in found)
    assert not any("language_model" in name or "text_model" in name or "lm_head" in name for name in found)
    linear = encoders.linear_layers(model)
    assert linear
    assert all(f"{name}.weight" in found for name in linear)


def test_a_model_of_text_has_no_such_parts():
    from ftrun.worker import builtin

    assert encoders.parameters(builtin.model({"dtype": torch.float32})) == {}


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_the_parts_for_media_train_only_if_asked(adapter, models):
    from ftrun import plugin
    from ftrun.worker import builtin

    def trained_weights(model: Any, **options: Any) -> set[str]:
        adapted = plugin.get("adapter", adapter)(**options).apply(
            model, SimpleNamespace(is_main=True, cfg=SimpleNamespace(stage=SFT()))
        )
        return {name for name, weight in adapted.named_parameters() if weight.requires_grad}

    without = trained_weights(processor_model(models("qwen2_vl")))
    assert without
    assert not any("visual" in name for name in without)
    with_them = trained_weights(processor_model(models("qwen2_vl")), media_encoders=True)
    assert without < with_them
    assert all("visual" in name for name in with_them - without)
    with pytest.raises(ConfigError, match="takes text alone"):
        trained_weights(builtin.model({"dtype": torch.float32}), media_encoders=True)


def test_a_processor_is_saved_and_loaded_again(models, tmp_path):
    tokenizer = processor.load_tokenizer(models("qwen2_vl"), {})
    media = processor.of(tokenizer)
    media.save(tmp_path)
    again = processor.of(processor.load_tokenizer(str(tmp_path), {}))
    assert again.digest == media.digest
    assert again.tokens == media.tokens
