# SPDX-License-Identifier: Apache-2.0
"""`efficientsam push` against a Hub on loopback: what arrives, what a stranger can do with it, and what goes wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import CommitFirst, CutDownload, CutUpload, Fault, HubServer, Refuse, record_waits
from hub_server.helpers import blobs_sent
from hub_server.storage import Repository
from huggingface_hub import HfApi, ModelCard, snapshot_download
from PIL import Image
from test_hub import code_blocks, listing, tiny_model, write_run

from efficientsam_hf import (
    EfficientSamMaskGenerator,
    EfficientSamModel,
    EfficientSamProcessor,
    SamiConfig,
    SamiForPreTraining,
)
from efficientsam_hf.cli import main
from efficientsam_hf.files import write_folder, write_json
from efficientsam_hf.hub.model_folder import export_run
from efficientsam_hf.identity import model_revision
from efficientsam_hf.training.pretrain_arguments import PretrainArguments
from efficientsam_hf.training.run_folder import RunLog, open_run


REPO = "tester/tiny-masks"
WEIGHTS = "model.safetensors"
EVERYTHING = {"points_per_crop": 2, "pred_iou_thresh": 0, "stability_score_thresh": 0, "output_type": "coco_rle"}
NO_PACKAGE = "import sys; sys.modules['efficientsam_hf'] = None\n"  # an import of it fails


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run that drew a picture."""
    folder = write_run(tmp_path / "runs" / "tiny", tiny_model(), monkeypatch)
    (folder / "pictures").mkdir()
    Image.new("RGB", (3000, 1500), "gray").save(folder / "pictures" / "step_000012.png")
    return folder


@pytest.fixture
def pretraining_run(tmp_path: Path) -> Path:
    """What pretraining of a tiny encoder leaves."""
    folder = tmp_path / "runs" / "pretrained"
    open_run(PretrainArguments(output_dir=str(folder), max_steps=4, train_scenes=True, teacher="default"))
    vision = {"image_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = SamiForPreTraining(
        SamiConfig(vision_config=vision, target_width=16, decoder_depth=1, decoder_width=32, decoder_heads=2)
    )
    write_folder(folder / "model", model.save_pretrained)
    log = RunLog(folder / "log.jsonl")
    for step in (2, 4):
        log("train", step=step, images=8 * step, image_size=64, loss=1.0 / step, masked_error=2.0 / step, cosine=0.5)
    write_json(folder / "run.json", {"steps": 4, "images": 32, "minutes": 0.5, "interrupted": None})
    return folder


def push(hub: HubServer, source: Path, *flags: str, token: str | None = None) -> int:
    return main(["push", str(source), REPO, "--token", token or hub.token, *flags])


def commits(repository: Repository) -> int:
    """How many commits main has; the first is the empty repository's."""
    return len(list(repository.history("main")))


def in_new_process(code: str, folder: Path) -> str:
    """What a process that has transformers and no package of ours prints at the end."""
    process = subprocess.run([sys.executable, "-c", NO_PACKAGE + code], cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip().splitlines()[-1]


# What arrives


def test_a_run_becomes_one_commit(hub: HubServer, run: Path, capsys: pytest.CaptureFixture) -> None:
    assert push(hub, run) == 0
    repository = hub.repository(REPO)
    assert f"published {hub.url}/{REPO}/commit/{repository.commit('main').id}" in capsys.readouterr().out
    assert commits(repository) == 2
    files = repository.files("main")
    assert {"README.md", "config.json", "processor_config.json", "metrics.json", WEIGHTS} < files.keys()
    assert {"modeling_efficientsam.py", "mask_generation_efficientsam.py", "previews/training.jpg"} < files.keys()
    local = {path.name: path.read_bytes() for path in (run / "hub").iterdir() if path.is_file()}
    assert {name for name in local if files[name] != local[name]} == {"README.md"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.model_name == "tiny-masks" and f'from_pretrained("{REPO}"' in card.text
    assert '"."' not in card.text and "At step 12" in card.text


def test_a_stranger_gets_the_same_tensors(hub: HubServer, run: Path, tmp_path: Path) -> None:
    assert push(hub, run) == 0
    model, processor = (kind.from_pretrained(run / "hub") for kind in (EfficientSamModel, EfficientSamProcessor))
    photo = Image.effect_noise((90, 60), 80).convert("RGB")
    photo.save(tmp_path / "photo.png")
    with torch.no_grad():
        outputs = model(**processor(images=photo, input_points=[[[[30, 20]]]], return_tensors="pt"))
    everything = EfficientSamMaskGenerator(model, processor)(photo, **EVERYTHING)
    torch.save([outputs.pred_masks, outputs.iou_scores], tmp_path / "expected.pt")
    write_json(tmp_path / "everything.json", everything["masks"])
    torch.save(everything["scores"], tmp_path / "scores.pt")
    printed = in_new_process(
        f"""
import json, torch
from transformers import AutoModel, AutoModelForMaskGeneration, AutoProcessor, pipeline
trust = {{"trust_remote_code": True}}
processor = AutoProcessor.from_pretrained("{REPO}", **trust)
inputs = processor(images="photo.png", input_points=[[[[30, 20]]]], return_tensors="pt")
masks, scores = torch.load("expected.pt")
for auto in (AutoModel, AutoModelForMaskGeneration):
    with torch.no_grad():
        outputs = auto.from_pretrained("{REPO}", **trust)(**inputs)
    assert torch.equal(outputs.pred_masks, masks) and torch.equal(outputs.iou_scores, scores)
generator = pipeline("mask-generation", model="{REPO}", **trust)
result = generator("photo.png", **{EVERYTHING})
assert result["masks"] == json.load(open("everything.json")) and len(result["masks"]) > 0
assert torch.equal(result["scores"], torch.load("scores.pt"))
print(type(generator).__module__.split(".")[0], type(generator).__name__)
""",
        tmp_path,
    )
    assert printed == "transformers_modules EfficientSamMaskGenerationPipeline"


def test_a_pretrained_encoder_is_published_too(hub: HubServer, pretraining_run: Path, tmp_path: Path) -> None:
    assert push(hub, pretraining_run) == 0
    model = SamiForPreTraining.from_pretrained(pretraining_run / "hub")
    pixels, noise = torch.rand(2, 3, 64, 64), torch.rand(2, 16)
    with torch.no_grad():
        expected = model(pixels, noise=noise).reconstruction
    torch.save([pixels, noise, expected], tmp_path / "expected.pt")
    card = ModelCard(hub.repository(REPO).files("main")["README.md"].decode())
    assert card.data.pipeline_tag == "image-feature-extraction" and "sami" in card.data.tags
    assert "error, hidden patches" in card.text and "None" not in card.text
    (tmp_path / "card.md").write_text(card.content)
    with_package, without = code_blocks(tmp_path / "card.md")
    names: dict[str, object] = {}
    exec(with_package, names)  # from_sami, by the name of the repository
    assert isinstance(names["model"], EfficientSamModel)
    check = """
import torch
pixels, noise, expected = torch.load("expected.pt")
with torch.no_grad():
    print(torch.equal(model(pixels, noise=noise).reconstruction, expected))
"""
    assert in_new_process(without + check, tmp_path) == "True"


@pytest.mark.slow
def test_code_of_the_published_card_runs(hub: HubServer, run: Path, tmp_path: Path) -> None:
    assert push(hub, run) == 0
    (tmp_path / "card.md").write_bytes(hub.repository(REPO).files("main")["README.md"])
    Image.new("RGB", (300, 200)).save(tmp_path / "photo.jpg")
    with_package, *without = code_blocks(tmp_path / "card.md")
    names: dict[str, object] = {}
    exec(with_package.replace("photo.jpg", str(tmp_path / "photo.jpg")), names)
    assert tuple(names["masks"][0].shape) == (1, 3, 200, 300)
    assert len(without) == 2
    printed = in_new_process("\n".join(without) + "\nprint(sorted(result))", tmp_path)
    assert printed == "['areas', 'boxes', 'masks', 'points', 'scores', 'stability_scores']"


def test_what_the_folder_no_longer_has_goes(hub: HubServer, run: Path, tmp_path: Path) -> None:
    folder = export_run(run, tmp_path / "out", with_code=True)
    assert push(hub, folder) == 0
    shard = "model-00001-of-00002.safetensors"
    api = HfApi(token=hub.token)
    api.upload_file(path_or_fileobj=b"of an earlier push", path_in_repo=shard, repo_id=REPO)
    api.upload_file(path_or_fileobj=b"someone's own", path_in_repo="notes.md", repo_id=REPO)
    assert push(hub, folder) == 0
    files = hub.repository(REPO).files("main")
    assert shard not in files and files["notes.md"] == b"someone's own"


def test_the_same_again_makes_no_commit(hub: HubServer, run: Path) -> None:
    assert push(hub, run) == 0
    before = commits(hub.repository(REPO))
    assert push(hub, run) == 0
    assert commits(hub.repository(REPO)) == before
    assert len(blobs_sent(hub)) == len(set(blobs_sent(hub))), "a blob was sent twice"


def test_branch_tag_private_and_gated(hub: HubServer, run: Path) -> None:
    assert push(hub, run, "--branch", "trial", "--tag", "v1", "--private", "--gated", "manual") == 0
    repository = hub.repository(REPO)
    assert f'"{REPO}", revision="trial"' in repository.files("trial")["README.md"].decode()
    assert WEIGHTS in repository.files("trial") and WEIGHTS not in repository.files("main")
    assert repository.commit("v1").id == repository.commit("trial").id
    assert repository.private and repository.gated == "manual"


def test_nothing_private_goes_where_all_can_see_it(hub: HubServer, run: Path, capsys: pytest.CaptureFixture) -> None:
    HfApi(token=hub.token).create_repo(REPO)
    assert push(hub, run, "--private") == 2
    assert f"{REPO} exists and is public" in failure(capsys)
    assert hub.requests("PUT", "^/storage/") == [] and commits(hub.repository(REPO)) == 1


def test_a_pull_request_leaves_main_alone(hub: HubServer, run: Path, capsys: pytest.CaptureFixture) -> None:
    assert push(hub, run, "--pull-request") == 0
    repository = hub.repository(REPO)
    assert WEIGHTS not in repository.files("main") and WEIGHTS in repository.files("refs/pr/1")
    assert "discussions/1" in capsys.readouterr().out


def test_a_dry_run_sends_nothing(hub: HubServer, run: Path, capsys: pytest.CaptureFixture) -> None:
    assert push(hub, run, "--dry-run", "--space", "tester/demo") == 0
    assert hub.requests() == []
    printed = capsys.readouterr().out
    assert re.search(r"[\d,]+  model\.safetensors", printed) and "the Space tester/demo would show it" in printed
    assert f"would go to {REPO}" in printed and (run / "hub" / WEIGHTS).is_file()


def test_a_space_is_pointed_at_the_model(hub: HubServer, run: Path) -> None:
    assert push(hub, run, "--space", "tester/demo") == 0
    space = hub.repository("tester/demo", kind="space")
    files = space.files("main")
    assert {"app.py", "requirements.txt", "README.md"} < files.keys()
    assert not [name for name in files if "__pycache__" in name or name == "__init__.py"]
    assert b"efficientsam_hf" not in files["app.py"], "a Space runs the published code"
    assert space.variables["MODEL_ID"]["value"] == REPO
    assert ModelCard(files["README.md"].decode()).data.to_dict()["models"] == [REPO]
    assert push(hub, run, "--space", "tester/demo") == 0, "a second time it is updated"


# What goes wrong


def failure(capsys: pytest.CaptureFixture) -> str:
    """The one line that a failed command leaves."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("efficientsam:")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault(CutUpload(after=10**9, reset=True), path=r"/commit/"), "the connection to the Hub broke"),
        (Fault(Refuse(503), path=r"/commit/"), "the Hub answers 503"),
        (Fault(Refuse(429, retry_after=30), path=r"/commit/"), "the Hub answers 429"),
        (Fault(Refuse(401), path=r"/commit/"), "does not accept the token"),
        (Fault(Refuse(403), path=r"/commit/"), f"may not write to {REPO}"),
        (Fault(CommitFirst(), path=r"/commit/"), "was changed by someone else"),
        (Fault(CutUpload(after=2000), path="^/storage/", method="PUT", times=99), "the connection to the Hub broke"),
        (Fault(Refuse(503), path="^/storage/", method="PUT", times=99), "the Hub answers 503"),
    ],
    ids=["cut-commit", "503-commit", "429-commit", "401", "403", "other-commit", "cut-upload", "503-upload"],
)
def test_a_fault_is_one_line_and_no_half(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, fault, expected
) -> None:
    record_waits(monkeypatch)
    hub.faults.append(fault)
    assert push(hub, run) == 2
    assert expected in failure(capsys) and fault.hits > 0
    repository = hub.repository(REPO)
    others = isinstance(fault.action, CommitFirst)
    assert commits(repository) == 1 + others and WEIGHTS not in repository.files("main"), "something was published"
    arrived = blobs_sent(hub)
    hub.faults.clear()
    assert push(hub, run) == 0, "given again it goes through"
    assert WEIGHTS in hub.repository(REPO).files("main")
    size = (run / "hub" / WEIGHTS).stat().st_size
    assert blobs_sent(hub).count(size) == 1, "weights that arrived were sent again"
    assert set(arrived) <= set(blobs_sent(hub))


def test_a_busy_server_is_waited_for(hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = record_waits(monkeypatch)
    hub.faults += [
        Fault(Refuse(429, retry_after=7), path="/preupload/"),
        Fault(Refuse(503), path="/info/lfs/objects/batch"),
        Fault(CutUpload(after=2000, reset=True), path="^/storage/", method="PUT"),
    ]
    assert push(hub, run) == 0
    assert waits[0] >= 7 and len(waits) == 3
    assert commits(hub.repository(REPO)) == 2


def test_a_lost_answer_is_no_second_commit(hub: HubServer, run: Path, capsys: pytest.CaptureFixture) -> None:
    hub.faults.append(Fault(CutDownload(after=0, reset=True), path=r"/commit/"))
    assert push(hub, run) == 2
    assert "the connection to the Hub broke" in failure(capsys)
    assert push(hub, run) == 0
    assert commits(hub.repository(REPO)) == 2


def test_tokens(hub: HubServer, run: Path, capsys: pytest.CaptureFixture) -> None:
    assert push(hub, run, token="hf_unknown") == 2
    assert "does not accept the token" in failure(capsys)
    assert push(hub, run, token=hub.read_token) == 2
    assert f"may not write to {REPO}" in failure(capsys)
    assert main(["push", str(run), REPO]) == 2  # HF_HOME has none
    assert "token" in failure(capsys)


def test_an_invalid_card_stops_before_anything_is_made(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture
) -> None:
    assert push(hub, run, "--license", "no-such-licence") == 2
    assert "license" in failure(capsys)
    assert not [line for line in hub.log if line.path.endswith("/repos/create")]


def test_a_tag_is_not_moved(hub: HubServer, run: Path, capsys: pytest.CaptureFixture) -> None:
    assert push(hub, run, "--tag", "v1") == 0
    assert push(hub, run, "--tag", "v1") == 0, "given again, the tag is where it should be"
    tagged = hub.repository(REPO).commit("v1").id
    assert push(hub, run, "--tag", "v1", "--full-precision") == 2
    assert "'v1' stays on" in failure(capsys)
    assert push(hub, run, "--tag", "v1", "--full-precision") == 2
    assert "has a tag 'v1' on another commit already" in failure(capsys)
    assert hub.repository(REPO).commit("v1").id == tagged


def test_a_gate_stands_before_the_files(hub: HubServer, run: Path) -> None:
    hub.faults.append(Fault(Refuse(403), path="/settings"))
    assert push(hub, run, "--gated", "auto") == 2
    assert commits(hub.repository(REPO)) == 1


def test_a_space_does_not_show_what_is_private(hub: HubServer, run: Path, capsys: pytest.CaptureFixture) -> None:
    HfApi(token=hub.token).create_repo("tester/demo", repo_type="space", space_sdk="gradio")
    assert push(hub, run, "--private", "--space", "tester/demo") == 2
    assert "would show a private model" in failure(capsys)
    HfApi(token=hub.token).create_repo(REPO, private=True)  # it says itself that it is private
    assert push(hub, run, "--space", "tester/demo") == 2
    assert "would show a private model" in failure(capsys)
    assert push(hub, run, "--private", "--space", "tester/other") == 0
    assert hub.repository("tester/other", kind="space").private
    assert "give tester/other a secret HF_TOKEN" in capsys.readouterr().out


def test_only_a_promptable_model_with_code_gets_a_space(
    hub: HubServer, run: Path, pretraining_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert push(hub, pretraining_run, "--space", "tester/demo") == 2
    assert "of type 'sami'" in failure(capsys)
    assert push(hub, export_run(run, tmp_path / "out"), "--space", "tester/demo") == 2
    assert "this folder has none" in failure(capsys)
    assert hub.requests() == []


def test_a_space_that_fails_keeps_its_model(hub: HubServer, run: Path) -> None:
    assert push(hub, run, "--space", "tester/demo") == 0
    hub.faults.append(Fault(Refuse(503), path="/api/spaces/.*/commit/"))
    assert main(["push", str(run), "tester/second", "--token", hub.token, "--space", "tester/demo"]) == 2
    assert hub.repository("tester/demo", kind="space").variables["MODEL_ID"]["value"] == REPO


def test_weights_that_do_not_arrive_by_xet(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("CAS service is gone")  # as hf_xet says it, with nothing behind it

    monkeypatch.setattr(HfApi, "preupload_lfs_files", fail)
    assert push(hub, run) == 2
    assert "CAS service is gone" in failure(capsys) and commits(hub.repository(REPO)) == 1


@pytest.mark.parametrize(
    ("repo_id", "flags", "expected"),
    [
        ("no-owner", [], "OWNER/NAME"),
        ("a/b/c", [], "repo_id"),
        (REPO, ["--space", "b c/d"], "--space"),
        (REPO, ["--space", "a/b", "--pull-request"], "--space shows what is on main"),
        (REPO, ["--tag", "v1", "--pull-request"], "tag"),
    ],
)
def test_bad_names_are_named(run: Path, capsys: pytest.CaptureFixture, repo_id, flags, expected) -> None:
    assert main(["push", str(run), repo_id, *flags]) == 2
    assert expected in failure(capsys)
    assert not (run / "hub").exists(), "that could be said before the export"


def test_folders_that_cannot_be_published(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["push", str(tmp_path / "nowhere"), REPO]) == 2
    assert "nowhere is not a folder" in failure(capsys)
    assert main(["push", str(run / "model"), REPO]) == 2
    assert "has no README.md" in failure(capsys)
    exported = export_run(run, tmp_path / "out")
    assert main(["push", str(exported), REPO, "--metrics", "m.json"]) == 2
    assert "--metrics is for run folders" in failure(capsys)
    (exported / "credentials.json").write_text("{}")
    (exported / "previews").mkdir()
    (exported / "previews" / "patient.png").write_bytes(b"")
    assert main(["push", str(exported), REPO]) == 2
    assert "holds credentials.json, previews/patient.png" in failure(capsys)
    (exported / "credentials.json").unlink()
    (exported / "previews" / "patient.png").unlink()
    (exported / WEIGHTS).unlink()
    assert main(["push", str(exported), REPO]) == 2
    assert "has no weights" in failure(capsys)


def test_speed_stands_in_the_card(run: Path, tmp_path: Path) -> None:
    speed = {
        "rows": [{"work": "encoder", "seconds": 0.25}],
        "command": "efficientsam benchmark /home/someone/photos/x.jpg",
        "date": "2026-05-04T03:02:01+00:00",
        "dtype": "float32",
        "machine": {"cpu": "Some CPU", "cores": 2, "threads": 2, "gpus": []},
    }
    (tmp_path / "speed.json").write_text(json.dumps(speed))
    text = (export_run(run, tmp_path / "out", speed=tmp_path / "speed.json") / "README.md").read_text()
    assert "| encoder | 250.0 |" in text and "efficientsam benchmark photos/x.jpg" in text
    assert "/home/someone" not in text
    with pytest.raises(ValueError, match="lacks rows"):
        (tmp_path / "speed.json").write_text("{}")
        export_run(run, tmp_path / "other", speed=tmp_path / "speed.json")


def test_of_several_models_the_runs_own_numbers_count(run: Path, metrics: Path, tmp_path: Path) -> None:
    own = json.loads(metrics.read_text()) | {"revision": model_revision(str(run / "model"))}
    other = own | {"revision": "sha256:another", "metrics": {**own["metrics"], "box": own["metrics"]["center"]}}
    metrics.write_text(json.dumps({"models": [other, own], "differences": []}))
    card = ModelCard((export_run(run, tmp_path / "out", metrics=metrics) / "README.md").read_text())
    assert [result.metric_value for result in card.data.eval_results] == [0.4213, 0.6679]
    metrics.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="of another model than this one"):
        export_run(run, tmp_path / "other", metrics=metrics)


def test_names_of_data_sets_are_the_hubs(hub: HubServer, run: Path, metrics: Path) -> None:
    """A type of two words would have the whole card refused."""
    record = json.loads(metrics.read_text()) | {"command": "efficientsam evaluate --scenes 48"}
    metrics.write_text(json.dumps(record))
    assert push(hub, run, "--metrics", str(metrics)) == 0
    (result, _) = ModelCard(hub.repository(REPO).files("main")["README.md"].decode()).data.eval_results
    assert (result.dataset_type, result.dataset_name) == ("generated-scenes", "generated scenes")


def test_previews_are_of_the_saved_weights(run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (10, 10)).save(run / "pictures" / "step_000099.png")  # after the weights were saved
    exported = export_run(run, tmp_path / "out", with_code=True)
    with Image.open(exported / "previews" / "training.jpg") as picture:
        assert picture.size == (1600, 800)
    assert "previews" not in listing(export_run(run, tmp_path / "plain"))


def test_pictures_of_ones_own_data_stay_at_home(run: Path, tmp_path: Path) -> None:
    record = json.loads((run / "args.json").read_text())
    record["arguments"] |= {"train_scenes": False, "train_annotations": "/home/someone/patients.json"}
    write_json(run / "args.json", record)
    exported = export_run(run, tmp_path / "out", with_code=True)
    assert "previews" not in listing(exported) and "someone" not in (exported / "README.md").read_text()
    assert "previews" in listing(export_run(run, tmp_path / "shown", with_code=True, preview=True))


def test_the_card_says_no_more_than_is_known(run: Path, tmp_path: Path) -> None:
    record = json.loads((run / "args.json").read_text())
    card = ModelCard((export_run(run, tmp_path / "scratch") / "README.md").read_text())
    assert "never a photograph" in card.text
    record["arguments"]["model"] = "someone/efficientsam-s"
    write_json(run / "args.json", record)
    card = ModelCard((export_run(run, tmp_path / "from-hub") / "README.md").read_text())
    assert "never a photograph" not in card.text and card.data.base_model == "someone/efficientsam-s"
    record["local"] = ["model"]  # a folder that is gone
    write_json(run / "args.json", record)
    card = ModelCard((export_run(run, tmp_path / "from-folder") / "README.md").read_text())
    assert card.data.base_model is None


def test_downloads_are_whole(hub: HubServer, run: Path) -> None:
    assert push(hub, run) == 0
    folder = Path(snapshot_download(REPO))
    assert (folder / WEIGHTS).read_bytes() == (run / "hub" / WEIGHTS).read_bytes()


# What a folder may hold


@pytest.fixture
def exported(run: Path, tmp_path: Path) -> Path:
    """A model folder with code and a picture."""
    return export_run(run, tmp_path / "exported", with_code=True)


def refusal(folder: Path, capsys: pytest.CaptureFixture) -> str:
    assert main(["push", str(folder), REPO, "--dry-run"]) == 2
    return failure(capsys)


def test_links_out_of_the_folder_are_refused(exported: Path, run: Path, tmp_path: Path, capsys) -> None:
    secret = tmp_path / "id_ed25519"
    secret.write_text("PRIVATE KEY")
    (exported / "hidden").mkdir()
    for name in ("metrics.json", "model-00002-of-00002.safetensors", "previews/more", "hidden/.key", WEIGHTS):
        (exported / name).unlink(missing_ok=True)
        (exported / name).symlink_to(secret)
        assert f"{exported / name} is a link out of the folder, to {secret}" in refusal(exported, capsys)
        (exported / name).unlink()
    for place in ("args.json", "pictures/step_000099.png", "model/config.json", "checkpoints"):
        kept = (run / place).rename(tmp_path / "kept") if (run / place).exists() else None
        (run / place).symlink_to(kept or tmp_path)
        assert main(["export", str(run), str(tmp_path / "again")]) == 2
        assert f"{run / place} is a link out of the folder" in failure(capsys)
        (run / place).unlink()
        if kept:
            kept.rename(run / place)
    assert not (tmp_path / "again").exists()


def test_links_within_a_folder_and_snapshots_of_the_cache_are_followed(exported: Path, tmp_path: Path, capsys) -> None:
    (exported / WEIGHTS).rename(exported / ".weights")
    (exported / WEIGHTS).symlink_to(".weights")
    assert main(["push", str(exported), REPO, "--dry-run"]) == 0

    cached = tmp_path / "models--someone--tiny"
    snapshot = cached / "snapshots" / ("0" * 40)
    (cached / "blobs").mkdir(parents=True)
    for number, path in enumerate(path for path in exported.rglob("[!.]*") if path.is_file()):
        blob, link = cached / "blobs" / str(number), snapshot / path.relative_to(exported)
        blob.write_bytes(path.read_bytes())
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert main(["push", str(snapshot), REPO, "--dry-run"]) == 0
    assert WEIGHTS in capsys.readouterr().out
    (cached / "secret").write_text("{}")
    (snapshot / "metrics.json").unlink()
    (snapshot / "metrics.json").symlink_to("../../secret")
    assert "is a link out of the folder" in refusal(snapshot, capsys)


CONTENTS = [  # file, content, words of the error
    (WEIGHTS, b"-----BEGIN PRIVATE KEY-----", "is no safetensors file"),
    (WEIGHTS, b"", "is no safetensors file"),
    ("metrics.json", b"root:x:0:0", "is not a JSON file, or damaged"),
    ("metrics.json", b"[1]", "holds a list, expected a JSON object"),
    ("metrics.json", b'{"auths": {"docker.io": "secret"}}', "is something else: it has 'auths'"),
    ("config.json", b"\xff\xfe\x00", "is not a JSON file, or damaged"),
    ("processor_config.json", b'"text"', "holds a str"),
    ("modeling_efficientsam.py", b"import os\n", "is not the code of this version of efficientsam-hf"),
    ("evil_efficientsam.py", b"import os\n", "is not the code of this version of efficientsam-hf"),
    ("README.md", b"\x89PNG\r\n\xff", "is no text in UTF-8"),
    ("README.md", b"---\nlicense: mit\n---\n\0", "is no text: it holds a zero byte"),
    ("previews/training.jpg", b"GIF89a", "is no JPEG picture"),
    ("previews/scenes.png", b"secret", "is no PNG picture"),
    ("model-00001-of-00001.safetensors", None, "other weights than it should: model-00001-of-00001.safetensors"),
    ("model.safetensors.index.json", b'{"weight_map": []}', "has no weight_map"),
    ("model.safetensors.index.json", b'{"weight_map": {"a": "../b.safetensors"}}', "../b.safetensors"),
]


@pytest.mark.parametrize(("name", "content", "words"), CONTENTS, ids=[f"{case[0]}-{case[1]}" for case in CONTENTS])
def test_files_are_what_their_names_say(exported: Path, capsys, name: str, content: bytes | None, words: str) -> None:
    (exported / name).write_bytes((exported / WEIGHTS).read_bytes() if content is None else content)
    assert words in refusal(exported, capsys)


@pytest.mark.parametrize(
    "pointer", ["someone/else--modeling_efficientsam.EfficientSamModel", "evil_efficientsam.Model", "os.system"]
)
def test_a_config_points_to_the_code_beside_it(exported: Path, capsys, pointer: str) -> None:
    for name in ("config.json", "processor_config.json"):
        before = (exported / name).read_text()
        content = json.loads(before)
        content["auto_map"] |= {"AutoModel": [pointer, None]}
        (exported / name).write_text(json.dumps(content))
        assert f"points to code that is not in the folder: {pointer!r}" in refusal(exported, capsys)
        (exported / name).write_text(before)
    assert main(["push", str(exported), REPO, "--dry-run"]) == 0


def test_a_token_from_a_file(hub: HubServer, exported: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "token"
    file.write_text(f"{hub.token}\n")
    assert main(["push", str(exported), REPO, "--token-file", str(file)]) == 0
    capsys.readouterr()
    for content in (b"", b"two words", b"secret\nsecret", b"s\xe9cret", b"s" * 10**6, None):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        assert main(["push", str(exported), REPO, "--token-file", str(file)]) == 2
        line = failure(capsys)
        assert f"--token-file {file}" in line and "secret" not in line and len(line) < 500
    assert main(["push", str(exported), REPO, "--token", "sec ret\n"]) == 2
    assert "--token does not hold a token: expected one word of ASCII, got 8 characters" in failure(capsys)
    assert main(["push", str(exported), REPO, "--token", "a", "--token-file", str(file)]) == 2
    assert "not allowed with" in failure(capsys)
