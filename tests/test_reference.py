"""The published command lines, pasted and shortened, on real photographs; their trees, file by file."""

import csv
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import kizu
from kizu.cli.main import cli
from kizu.config.backbone_names import in_timm
from kizu.detectors.efficientad.networks import PDN
from kizu.export.reference_files import network_state
from kizu.features.backbone import Backbone
from kizu.features.safe_load import read_plain
from processes import kizu as command

TAPS = ("-b", "efficientnet_lite2", "-le", "blocks.2", "-le", "blocks.4")
SMALL = ("--resize", "128", "--imagesize", "112")
MODEL = {"nnscorer_search_index.faiss", "patchcore_params.pkl"}
HEADER = ["Row Names", "instance_auroc", "full_pixel_auroc", "anomaly_pixel_auroc"]


def line(*arguments):
    """A command in this process; what it printed."""
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if done.exception is not None:
        raise done.exception
    return done.stdout


PROGRAMS = {
    "python bin/run_patchcore.py": "patchcore",
    "python bin/load_and_evaluate_patchcore.py": "patchcore-evaluate",
    "python3 main.py": "simplenet",
}


def pasted(script):
    """The words behind the program's name in a README's script, after the shell has had its way with them."""
    for program, name in PROGRAMS.items():
        script = script.replace(program, f"printf '%s\\0' reference {name}")
    done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def tree(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def table(path):
    return list(csv.reader(path.read_text().splitlines()))


def floats(row):
    return [float(value) for value in row[1:]]


@pytest.fixture(scope="module")
def mvtec(real_data, tmp_path_factory):
    """Bottles and pills in MVTec's layout, few of each."""
    root = tmp_path_factory.mktemp("data") / "mvtec"
    for category, defect in (("bottle", "broken_large"), ("pill", "crack")):
        for place, count in (("train/good", 8), ("test/good", 3), (f"test/{defect}", 3), (f"ground_truth/{defect}", 3)):
            (root / category / place).mkdir(parents=True)
            for path in sorted((real_data / "mvtec_ad" / category / place).iterdir())[:count]:
                shutil.copy(path, root / category / place)
    return root


@pytest.fixture(scope="module")
def trained(mvtec, tmp_path_factory):
    """PatchCore's README, its first script."""
    folder = tmp_path_factory.mktemp("patchcore")
    words = pasted(
        f"""
datapath={mvtec} datasets=('bottle' 'pill')
dataset_flags=($(for dataset in "${{datasets[@]}}"; do echo '-d '$dataset; done))

python bin/run_patchcore.py --gpu 0 --seed 0 --save_patchcore_model \\
--log_group IM224_WR50_L2-3_P01_D1024-1024_PS-3_AN-1_S0 --log_online --log_project MVTecAD_Results results \\
patch_core -b efficientnet_lite2 -le blocks.2 -le blocks.4 --faiss_on_gpu \\
--pretrain_embed_dimension 1024  --target_embed_dimension 1024 --anomaly_scorer_num_nn 1 --patchsize 3 \\
sampler -p 0.1 approx_greedy_coreset dataset --resize 128 --imagesize 112 "${{dataset_flags[@]}}" mvtec $datapath
"""
    )
    command(*words, cwd=folder, env={**os.environ, "WANDB_MODE": "offline"})
    return folder / "results" / "MVTecAD_Results" / "IM224_WR50_L2-3_P01_D1024-1024_PS-3_AN-1_S0"


def test_patchcores_readme_makes_the_tree_that_it_draws(trained):
    models = {f"models/mvtec_{category}/{name}" for category in ("bottle", "pill") for name in MODEL}
    assert tree(trained) == models | {"results.csv"}
    header, bottle, pill, mean = table(trained / "results.csv")
    assert header == HEADER and [row[0] for row in (bottle, pill, mean)] == ["mvtec_bottle", "mvtec_pill", "Mean"]
    assert float(bottle[1]) == 1.0 and float(mean[2]) == pytest.approx((float(bottle[2]) + float(pill[2])) / 2)
    assert read_plain(trained / "models" / "mvtec_bottle" / "patchcore_params.pkl") == {
        "backbone.name": "efficientnet_lite2",
        "layers_to_extract_from": ["blocks.2", "blocks.4"],
        "input_shape": (3, 112, 112),
        "pretrain_embed_dimension": 1024,
        "target_embed_dimension": 1024,
        "patchsize": 3,
        "patchstride": 1,
        "anomaly_scorer_num_nn": 1,
    }
    assert list((trained.parents[2] / "wandb").glob("offline-run-*/*.wandb"))  # --log_online, kept on this machine


def test_patchcores_evaluation_gives_the_same_results(trained, mvtec, monkeypatch):
    monkeypatch.chdir(trained.parents[2])
    words = pasted(
        f"""
datapath={mvtec}
loadpath={trained.parent}
modelfolder={trained.name}
savefolder=evaluated_results'/'$modelfolder

datasets=('bottle'  'pill')
dataset_flags=($(for dataset in "${{datasets[@]}}"; do echo '-d '$dataset; done))
model_flags=($(for dataset in "${{datasets[@]}}"; do echo '-p '$loadpath'/'$modelfolder'/models/mvtec_'$dataset; done))

python bin/load_and_evaluate_patchcore.py --gpu 0 --seed 0 $savefolder \\
patch_core_loader "${{model_flags[@]}}" --faiss_on_gpu \\
dataset --resize 128 --imagesize 112 "${{dataset_flags[@]}}" mvtec $datapath
"""
    )
    line(*words)
    again = trained.parents[2] / "evaluated_results" / trained.name
    assert tree(again) == {"results.csv"}
    for ours, theirs in zip(table(again / "results.csv"), table(trained / "results.csv"), strict=True):
        assert ours[0] == theirs[0] and (ours == HEADER or floats(ours) == pytest.approx(floats(theirs)))


def test_one_model_for_several_data_sets_and_pictures_of_them(trained, mvtec, tmp_path):
    data = ("dataset", *SMALL, "-d", "bottle", "-d", "pill", "mvtec", mvtec)
    loader = ("patch_core_loader", "-p", trained / "models" / "mvtec_bottle")
    line("reference", "patchcore-evaluate", "--save_segmentation_images", tmp_path / "seen", *loader, *data)
    pictures = {f"{c}_test_{d}_00{n}" for c, d in (("bottle", "broken_large"), ("pill", "crack")) for n in range(3)}
    pictures |= {f"{category}_test_good_00{number}" for category in ("bottle", "pill") for number in range(3)}
    assert {Path(name).stem for name in tree(tmp_path / "seen")} == {"results", *pictures}
    with pytest.raises(kizu.OptionError, match=r"3 models .* 2 categories"):
        line("reference", "patchcore-evaluate", tmp_path, *loader, *loader[1:], *loader[1:], *data)


def test_patchcores_ensemble_line(mvtec, tmp_path):
    data = ("dataset", *SMALL, "-d", "bottle", "mvtec", mvtec)
    networks = ("-b", "efficientnet_lite2", "-b", "efficientnet_lite2.seed-7", "-b", "efficientnet_lite2")
    layers = [part for name in ("0.blocks.2", "0.blocks.4", "1.blocks.2", "2.blocks.4") for part in ("-le", name)]
    words = (
        *("reference", "patchcore", "--gpu", 0, "--seed", 0, "--save_patchcore_model", "--save_segmentation_images"),
        *("--log_group", "name", "--log_project", "logs", tmp_path / "results", "patch_core", *networks, *layers),
        *("--faiss_on_gpu", "--pretrain_embed_dimension", 1024, "--target_embed_dimension", 384),
        *("--anomaly_scorer_num_nn", 1, "--patchsize", 3, "sampler", "-p", 0.01, "approx_greedy_coreset", *data),
    )
    line(*words)
    run = tmp_path / "results" / "logs" / "name"
    files = {f"models/mvtec_bottle/Ensemble-{n}-3_{name}" for n in (1, 2, 3) for name in MODEL}
    pictures = {name for name in tree(run) if name.startswith("segmentation_images/mvtec_bottle/bottle_test_")}
    assert tree(run) == files | pictures | {"results.csv"} and len(pictures) == 6
    line("reference", "patchcore-evaluate", tmp_path, "patch_core_loader", "-p", run / "models" / "mvtec_bottle", *data)
    assert float(table(tmp_path / "results.csv")[1][1]) >= 8 / 9
    line(*words)
    assert (run.with_name("name_0") / "results.csv").exists()


def test_patchcores_dead_flags_work(mvtec, tmp_path):
    def parameters(name, *flags, main=()):
        line(
            *("reference", "patchcore", "--save_patchcore_model", "--log_group", name, *main, tmp_path, "patch_core"),
            *(*TAPS, *flags, "sampler", "-p", 0.02, "approx_greedy_coreset"),
            *("dataset", *SMALL, "-d", "bottle", "--train_val_split", 0.5, "mvtec", mvtec),
        )
        return read_plain(tmp_path / "project" / name / "models" / "mvtec_bottle" / "patchcore_params.pkl")

    flags = ("--anomaly_scorer_num_nn", 3, "--patchoverlap", 0.5, "--patchsize", 5)
    ours = parameters("ours", *flags)
    assert (ours["anomaly_scorer_num_nn"], ours["patchstride"]) == (3, 2)
    theirs = parameters("theirs", *flags, "--aggregation", "mlp", main=("--as-original",))
    assert (theirs["anomaly_scorer_num_nn"], theirs["patchstride"]) == (1, 1)
    for flag, words in (
        (("-pa", 5), "`patchsize_aggregate`"),
        (("--patchscore", "mean"), "`top=0`"),
        (("--aggregation", "mlp"), "mean"),
    ):
        with pytest.raises(kizu.KizuError, match=words):
            parameters("refused", *flag)
    assert not (tmp_path / "project" / "refused").exists()


def test_published_networks_without_weights_get_the_sentence_that_helps(mvtec, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", unreachable)
    rest = ("sampler", "identity", "dataset", "-d", "bottle", "mvtec", mvtec)
    for name, timms in (("wideresnet50", "wide_resnet50_2.tv_in1k"), ("densenet201", "densenet201.tv_in1k")):
        layers = ("-le", "layer2") if name.startswith("wide") else ("-le", "features.denseblock2")
        with pytest.raises(kizu.ModelError, match=rf"{timms}.*`weights=FILE`"):
            line("reference", "patchcore", tmp_path, "patch_core", "-b", name, *layers, *rest)
    with pytest.raises(kizu.OptionError, match="bninception"):
        line("reference", "patchcore", tmp_path, "patch_core", "-b", "bninception", *rest)
    with pytest.raises(kizu.OptionError, match="patch_core, sampler, dataset"):
        line("reference", "patchcore", tmp_path, "sampler", "identity")


@pytest.mark.slow
def test_the_readmes_own_networks_with_random_weights(mvtec, tmp_path):
    """Their names, layers and shapes, as no weights are at hand: the first README's line, and the ensemble's."""
    networks = {
        "wideresnet50": ("layer2", "layer3"),
        "wideresnet101": ("layer2", "layer3"),
        "resnext101": ("layer2", "layer3"),
        "densenet201": ("features.denseblock2", "features.denseblock3"),
    }
    for name, layers in networks.items():
        state = Backbone(in_timm(name), layers).network.state_dict()
        save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / f"{name}.safetensors")
    ensemble = tuple(networks)[1:]
    for group, names in (("one", ("wideresnet50",)), ("three", ensemble)):
        flags = [part for name in names for part in ("-b", name, "--weights", tmp_path / f"{name}.safetensors")]
        for number, name in enumerate(names):
            prefix = f"{number}." if len(names) > 1 else ""
            flags += [part for layer in networks[name] for part in ("-le", prefix + layer)]
        line(
            *("reference", "patchcore", "--save_patchcore_model", "--log_group", group, tmp_path, "patch_core", *flags),
            *("--target_embed_dimension", 384, "sampler", "-p", 0.01, "approx_greedy_coreset"),
            *("dataset", "--resize", 72, "--imagesize", 64, "-d", "bottle", "mvtec", mvtec),
        )
        folder = tmp_path / "project" / group / "models" / "mvtec_bottle"
        saved = [read_plain(path)["backbone.name"] for path in sorted(folder.glob("*.pkl"))]
        assert saved == list(names)


def test_simplenets_run_sh_makes_the_tree_that_the_supplement_draws(mvtec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = f"""
datapath={mvtec}
datasets=('bottle' 'pill')
dataset_flags=($(for dataset in "${{datasets[@]}}"; do echo '-d '"${{dataset}}"; done))

python3 main.py --gpu 4 --seed 0 --log_group simplenet_mvtec --log_project MVTecAD_Results \\
--results_path results --run_name run \\
net -b efficientnet_lite2 -le blocks.2 -le blocks.4 --pretrain_embed_dimension 1536 \\
--target_embed_dimension 1536 --patchsize 3 --meta_epochs 2 --embedding_size 256 --gan_epochs 1 --noise_std 0.015 \\
--dsc_hidden 1024 --dsc_layers 2 --dsc_margin .5 --pre_proj 1 \\
dataset --batch_size 8 --resize 72 --imagesize 64 "${{dataset_flags[@]}}" mvtec $datapath
"""
    done = CliRunner().invoke(cli, pasted(script), catch_exceptions=False)
    assert "--embedding_size 256: the projection gets so many channels" in done.stderr
    run = tmp_path / "results" / "MVTecAD_Results" / "simplenet_mvtec" / "run"
    files = tree(run)
    curves = {name for name in files if name.startswith("tensorboard/")}
    assert files - curves == {"results.csv", *(f"models/{n}/{f}" for n in (0, 1) for f in ("ckpt.pth", "params.pkl"))}
    assert {name.split("/")[1] for name in curves} == {"mvtec_bottle", "mvtec_pill"}
    rows = table(run / "results.csv")
    assert rows[0] == HEADER and [row[0] for row in rows[1:]] == ["mvtec_bottle", "mvtec_pill", "Mean"]
    net = kizu.SimpleNet()
    net.load_from_path(run / "models" / "0")  # the supplement's three lines
    score, mask = net.predict(next((mvtec / "bottle" / "test" / "good").iterdir()))
    assert isinstance(score, float) and mask.shape == (400, 400)
    assert read_plain(run / "models" / "0" / "params.pkl")["patchsize"] == 3
    before = (run / "results.csv").read_text()
    test = ("--log_project", "MVTecAD_Results", "--log_group", "simplenet_mvtec", "--run_name", "run")
    data = ("net", "dataset", "-d", "bottle", "-d", "pill", "mvtec", mvtec)
    with pytest.raises(kizu.OptionError, match="--overwrite"):
        line("reference", "simplenet", "--results_path", tmp_path / "results", *test, *data)
    line("reference", "simplenet", "--test", "--results_path", tmp_path / "results", *test, *data)
    assert (run / "results.csv").read_text() == before


CLIP = ("--pretrain_embed_dimension", 768, "--target_embed_dimension", 768, "--patchsize", 10)


@pytest.mark.parametrize(
    ("network", "layers"),
    [("vit_tiny_patch16_224", ("2", "3")), pytest.param("clip", ("2", "3"), marks=pytest.mark.slow)],
)
def test_simplenets_clip_line(network, layers, mvtec, tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file(
        {key: value.contiguous() for key, value in Backbone(network, layers).network.state_dict().items()}, weights
    )
    line(
        *("reference", "simplenet", "--results_path", tmp_path, "--run_name", "run", "net", "-b", network),
        *("-le", 2, "-le", 3, *CLIP, "--meta_epochs", 1, "--weights", weights, "--dsc_hidden", 64),
        *("dataset", "--batch_size", 8, "--resize", 329, "--imagesize", 288, "-d", "bottle", "mvtec", mvtec),
    )
    files = tree(tmp_path / "project" / "group" / "run")
    assert {"results.csv", "models/0/ckpt.pth", "models/0/params.pkl"} <= files


def test_simplenet_with_several_networks_trains_each_alone(mvtec, tmp_path):
    networks = ("-b", "efficientnet_lite2", "-b", "efficientnet_lite2.seed-3", "-le", "0.blocks.2", "-le", "1.blocks.4")
    dimensions = ("--pretrain_embed_dimension", 64, "--target_embed_dimension", 64, "--dsc_hidden", 32)
    data = ("dataset", *SMALL, "-d", "bottle", "mvtec", mvtec)
    command = ("reference", "simplenet", "--results_path", tmp_path, "--run_name", "two")
    line(*command, "net", *networks, *dimensions, *data)
    run = tmp_path / "project" / "group" / "two"
    rows = table(run / "results.csv")
    assert [row[0] for row in rows[1:]] == ["mvtec_bottle_network_0", "mvtec_bottle_network_1", "Mean"]
    models = [run / "models" / str(number) / "mvtec_bottle" for number in (0, 1)]
    layers = [read_plain(model / "params.pkl")["config"]["layers"] for model in models]
    assert [list(names) for names in layers] == [["blocks.2"], ["blocks.4"]]
    line(*command, "--test", "net", *networks, *dimensions, *data)
    assert table(run / "results.csv") == rows
    with pytest.raises(kizu.OptionError, match="3 files for 2 networks"):
        line(*command, "--overwrite", "net", *networks, *3 * ("--weights", "x"), *dimensions, *data)
    with pytest.raises(kizu.OptionError, match=r"whose layer it is, as in 0\.layer2"):
        line(*command, "--overwrite", "net", *networks, "-le", "blocks.2", *dimensions, *data)


def test_simplenets_published_protocol_and_every_parameter(mvtec, tmp_path):
    every = (
        *("--embedding_size", 64, "--aed_meta_epochs", 1, "--cos_lr", "--auto_noise", 0.3, "--proj_layer_type", 1),
        *("--mix_noise", 2, "--pre_proj", 2, "--dsc_layers", 3, "--dsc_lr", 0.0002, "--meta_epochs", 2),
    )
    varied = ("rotate_degrees", "translate", "scale", "brightness", "contrast", "saturation", "gray", "hflip", "vflip")
    strengths = [part for name in varied for part in (f"--{name}", 0.1)]
    dimensions = ("--pretrain_embed_dimension", 64, "--target_embed_dimension", 96)
    for name, main in (("ours", ()), ("theirs", ("--as-original",))):
        line(
            *("reference", "simplenet", *main, "--save_segmentation_images", "--results_path", tmp_path),
            *("--run_name", name, "net", *TAPS, *dimensions, *every, "dataset", *SMALL, "--augment", *strengths),
            *("--num_workers", 0, "--train_val_split", 0.75, "--batch_size", 4, "-d", "bottle", "mvtec", mvtec),
        )
        run = tmp_path / "project" / "group" / name
        config = read_plain(run / "models" / "0" / "params.pkl")["config"]
        assert config["rotate_degrees"] == 0.1 and config["dsc_layers"] == 3 and config["cos_lr"]
        assert config["embedding_size"] == (64 if name == "ours" else None)
        assert (config["auto_noise"], config["noise_std"]) == ((True, 0.3) if name == "ours" else (False, 0.05))
        assert any(file.startswith("segmentation_images/mvtec_bottle/bottle_test_") for file in tree(run))


def test_efficientads_and_puads_lines(mvtec, real_data, tmp_path):
    photographs, models = mvtec / "pill" / "train", tmp_path / "models"
    loco = tmp_path / "mvtec_loco_anomaly_detection" / "breakfast_box"
    source = real_data / "mvtec_loco" / "juice_bottle"
    for place, count in (("train/good", 4), ("validation/good", 3), ("test/good", 3), ("test/logical_anomalies", 3)):
        (loco / place).mkdir(parents=True)
        for path in sorted((source / place).iterdir())[:count]:
            shutil.copy(path, loco / place)
    short = ("--backbone", "efficientnet_lite2", "--steps", 1, "--batch_size", 1)
    train = ("reference", "efficientad")
    with pytest.raises(kizu.OptionError, match=r"teacher\.pt is missing"):
        line(*train, "student", photographs, models, "--dataset_path", loco)
    line(*train, "teacher", photographs, models, "--size", "s", *short)
    assert tree(models) == {f"s_size/teacher/{name}.pt" for name in ("teacher", "mu", "sigma")}
    teacher = models / "s_size" / "teacher" / "teacher.pt"
    assert torch.load(teacher, weights_only=True)["conv4.weight"].shape == (384, 256, 4, 4)
    mu = teacher.with_name("mu.pt")
    assert torch.load(mu, weights_only=True).shape == (384,)
    with pytest.raises(kizu.OptionError, match="not overwritten"):
        line(*train, "teacher", photographs, models, *short)
    teacher.unlink()
    torch.save(torch.full((384,), 0.5), mu)  # placed beforehand
    assert "Taken as they are" in line(*train, "teacher", photographs, models, *short)
    assert torch.load(mu, weights_only=True).unique().tolist() == [0.5]
    torch.manual_seed(0)
    torch.save(network_state(PDN("s", 24, (8, 8, 8))), teacher)  # quicker from here on
    with pytest.raises(kizu.OptionError, match="--dataset_path"):
        line(*train, "student", photographs, models)
    printed = line(*train, "student", photographs, models, "--dataset_path", loco, "--size", "s", "--steps", 2)
    folder = models / "s_size" / "mvtec_loco_anomaly_detection" / "breakfast_box"
    names = {"autoencoder.pt", "student.pt", "mu.pt", "sigma.pt", "quantile.pt", "results.txt"}
    assert tree(folder.parent) == {f"breakfast_box/{name}" for name in names}
    results = (folder / "results.txt").read_text()
    assert results.splitlines()[0].startswith("auroc score = ") and results in printed
    assert results.splitlines()[1].startswith("logical_anomalies auroc score = ")
    quantiles = torch.load(folder / "quantile.pt", weights_only=True)
    assert sorted(quantiles) == ["q_a_autoencoder", "q_a_student", "q_b_autoencoder", "q_b_student"]
    printed = line("reference", "puad", loco, models, "--size", "s", "--feature_extractor", "teacher")
    words = [row.rpartition(":")[0] for row in printed.splitlines()]
    assert words == [
        *("dataset name ", "category ", "size ", "feature extractor ", "efficient_ad auroc ", "puad auroc "),
        "puad auroc for logical_anomalies",
    ]
    assert printed.splitlines()[:2] == ["dataset name : mvtec_loco_anomaly_detection", "category : breakfast_box"]
    value = results.splitlines()[0].removeprefix("auroc score = ")
    assert f"efficient_ad auroc : {value}" in printed.splitlines()
