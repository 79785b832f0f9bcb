"""The commands of the lab: what the flags mean, what is refused, and whose checkpoint is read by whom."""

import json
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import optuna
import pytest
import torch
from conftest import ROOT, noprop
from laboratory import contents, flags_of, lab, quick_lab, refused, untrained

from benchmarks import frontier
from noprop_lab import parts, search
from noprop_lab.backprop import BackpropConfig
from noprop_lab.cascade import CascadeConfig
from noprop_lab.ct import CTConfig
from noprop_lab.dt import DTConfig
from noprop_lab.fm import FMConfig
from noprop_lab.infobatch import InfoBatchConfig
from noprop_lab.networks import CONFIGS, load
from noprop_lab.settings import SOURCES, DemoOptions, LabConfig, LabOptions


@pytest.fixture(autouse=True)
def quick():
    with quick_lab():
        yield


# --- Commands and settings ---------------------------------------------------------------------------------

PARTS = LabConfig(blocks="1-2", embedding="fixed", select="last")
COMMANDS = {  # what they mean
    "train --objective dt": DTConfig(),
    "train --objective=backprop": BackpropConfig(),
    "train --preset paper": DTConfig.paper(),
    "train --preset paper --num-blocks 4": DTConfig.paper(num_blocks=4),
    "train --preset paper --objective backprop": BackpropConfig.paper(),
    "train --dataset fashion_mnist": LabConfig(
        dataset="fashion_mnist", num_blocks=3, block="deep", epochs=24
    ),
    "train --dataset kmnist --epochs 3": LabConfig(dataset="kmnist", epochs=3),
    "train --dataset folder": LabConfig(dataset="folder", classes=("a", "b", "c")),
    "train --dataset folder --classes c a": LabConfig(dataset="folder", classes=("c", "a")),
    "train --dataset folder --image-size 40": LabConfig(
        dataset="folder", classes=("a", "b", "c"), image_size=40
    ),
    "train --blocks 1-2 --embedding fixed": PARTS,
    "train --embedding-from F": LabConfig(embedding="fixed"),
    "train --embedding-from F --blocks 1-2": PARTS,
    "train --classify z": LabConfig(classify="z"),
    "train --embedding onehot": LabConfig(embedding="onehot"),
    "train --preset paper --embedding fixed": DTConfig.paper(embedding="fixed"),  # its embed_wd has no effect
    "train --objective backprop --embedding onehot": BackpropConfig(embedding="onehot"),  # decides D
    "train --objective backprop --target classes --embedding fixed": BackpropConfig(
        target="classes", embedding="fixed"
    ),
    "train --embedding prototype --objective dt": DTConfig(embedding="prototype"),
    "train --block paper --target classes": LabConfig(block="paper", target="classes"),
    "search --hpo-storage sqlite:///x.db": LabConfig(),
    "search --objective dt --hpo-trials 3": DTConfig(),
    "evaluate F --early-exit 0.5": LabConfig(num_blocks=3, embed_dim=20),
    "predict F a.png b.png --early-exit 0.5": LabConfig(num_blocks=3, embed_dim=20),
}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_flag_of_the_labs_is_refused_by_the_script(line, capsys):
    command, arguments = line.split(" ", 1)
    ours = {"train": "", "search": "--run-hpo "}.get(command, f"--{command} ")
    refused(capsys, 2, (ours + arguments).split(), "or python -m noprop_lab --help", main=noprop.main)


@pytest.mark.parametrize("line", COMMANDS)
def test_what_a_command_means(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if " F" in line or "=F" in line:
        untrained(tmp_path).rename("F")
    for name in "abc":
        (tmp_path / "data" / name).mkdir(parents=True)
    command, *arguments = line.split() + ["--data-root=data"] * ("folder" in line)
    config, options, content = lab.read_command_line(command, arguments)
    assert config == COMMANDS[line]
    assert (content is not None) == (command in ("evaluate", "predict"))
    assert options.run_hpo == (command == "search") and options.resume is False
    assert str(options.evaluate) == ("F" if command == "evaluate" else "None")
    assert [str(x) for x in options.predict] == (["F", "a.png", "b.png"] if command == "predict" else [])
    assert options.early_exit == (0.5 if "--early-exit" in line else 1)
    assert options.hpo_storage == ("sqlite:///x.db" if "--hpo-storage" in line else None)
    assert str(options.embedding_from) == ("F" if "--embedding-from" in line else "None")


def test_the_paper_s_preset_names_the_run_that_is_resumed(tmp_path, capsys):
    """Beside a run of another objective."""
    flags = ["--preset=paper", "--resume", f"--output-dir={untrained(tmp_path).parent}"]
    config, _, content = lab.read_command_line("train", flags)
    assert config == DTConfig.paper() and content is None
    assert "Nothing to resume" in capsys.readouterr().out
    untrained(tmp_path, DTConfig.paper(num_blocks=1, epochs=7, patience=5))  # which are not the preset's
    found = lab.read_command_line("train", [*flags, "--num-blocks=1"])[0]
    assert (found.epochs, found.patience) == (7, 5)


def test_merge_gets_its_files(monkeypatch, capsys, tmp_path):
    refused(capsys, 2, ["--merge", "a.pt"], "or python -m noprop_lab --help", main=noprop.main)
    given = []
    monkeypatch.setattr(parts, "merge", lambda paths, options, *_: given.append((paths, options)) or 0)
    assert lab.main(["merge", "a.pt", "b.pt", f"--output-dir={tmp_path}"]) == 0
    [(paths, options)] = given
    assert [str(x) for x in paths] == ["a.pt", "b.pt"] and options.output_dir == tmp_path


def test_settings_of_an_objective():
    dt, paper, plain = DTConfig(), DTConfig.paper(), noprop.Config()
    assert (dt.target, dt.classify, dt.eta_loss_weight, dt.weights) == ("classes", "z", 0.1, "ddpm")
    assert (dt.temperature, dt.epochs, dt.block) == (1.0, plain.epochs, "small")
    assert (paper.target, paper.classify, paper.temperature) == ("classes", "z", 1.0)
    assert (paper.epochs, paper.batch_size, paper.block, paper.lr) == (100, 128, "paper", 1e-3)
    assert (paper.schedule, paper.ema_decay, paper.augment) == ("constant", 0.0, False)
    assert DTConfig.paper(epochs=2).epochs == 2
    assert BackpropConfig().step_threads == noprop.Options.threads
    rival, ct, fm = BackpropConfig.paper(), CTConfig(), FMConfig()
    mixes = rival.weights, rival.target, rival.classify, rival.temperature
    assert mixes == ("learned", "classes", "z", 1.0)
    for flow in (ct, fm):
        assert (flow.steps, flow.draws, flow.epochs, flow.temperature) == (10, 4, 30, 0.0)
    assert (ct.alpha_bar_start, ct.alpha_bar_end, fm.sigma) == (0.05, 0.9, 0.1)
    assert (CascadeConfig().hand_on, CascadeConfig().estimates) == ("features", "live")
    for config in (LabConfig(), BackpropConfig()):  # all else is the script's
        assert {name: getattr(config, name) for name in vars(plain)} | {"embed_dim": 20} == vars(plain) | {
            "embed_dim": 20
        }
    assert isinstance(LabConfig.reference(), LabConfig) and LabConfig.reference().block == "reference"


@pytest.mark.parametrize(
    ("flags", "block", "epochs"),
    [
        (["--dataset=fashion_mnist"], "deep", 24),
        (["--dataset=fashion_mnist", "--block=small"], "small", 24),
        (["--dataset=cifar10"], "deep", 30),
        (["--dataset=cifar100"], "deep", 30),
        (["--dataset=fashion_mnist", "--preset=reference"], "reference", 100),
        (["--dataset=cifar10", "--preset=paper"], "paper", 150),
        (["--dataset=cifar100", "--preset=paper", "--objective=fm"], "paper", 1000),
        (["--dataset=fashion_mnist", "--preset=paper", "--objective=ct"], "paper", 100),
        (["--dataset=cifar10", "--preset=paper", "--epochs=3"], "paper", 3),
        (["--dataset=cifar100", "--config=some.json"], "small", 30),
        (["--config=whole.json"], "small", 12),
    ],
)
def test_a_preset_wins_over_a_data_set_and_a_flag_over_both(flags, block, epochs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.json").write_text('{"block": "small"}')
    (tmp_path / "whole.json").write_text('{"dataset": "cifar10", "epochs": 12, "block": "small"}')
    config = lab.read_command_line("train", flags)[0]
    assert (config.block, config.epochs) == (block, epochs)
    assert SOURCES[config.dataset].name in ("FashionMNIST", "CIFAR10", "CIFAR100")


@pytest.mark.parametrize(
    ("flags", "num_blocks"),
    [
        ("", 3),
        ("--block=small", 10),
        ("--block=deep", 3),  # its own
        ("--config=small.json", 10),
        ("--preset=accurate", 4),
        ("--preset=reference", 10),
        ("--objective=fm", 1),
        ("--num-blocks=4", 4),
    ],
)
def test_a_data_sets_number_of_blocks_goes_with_its_block(flags, num_blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.json").write_text('{"block": "small"}')
    config = lab.read_command_line("train", ["--dataset=fashion_mnist", *flags.split()])[0]
    assert config.num_blocks == num_blocks


def test_the_accurate_preset_is_what_was_measured_under_its_name():
    assert frontier.SMALLER_BATCHES.configs(3) == [LabConfig.accurate(seed=3)]
    recipes = [replace(x, seed=3, num_blocks=4).saved() for x in frontier.PLAIN.configs(3)]
    assert len(recipes) == 4 and all(x | LabConfig.accurate(seed=3).saved() == x for x in recipes)


def test_a_written_number_of_dimensions_is_a_setting_only_where_it_was_chosen(tmp_path, capsys):
    """saved() always writes it; other embeddings and other numbers of classes bring their own."""
    for config, flags, dim in (
        (LabConfig(), ["--embedding=onehot"], 10),
        (LabConfig(embedding="onehot"), ["--embedding=learned"], 20),
        (LabConfig(), ["--dataset=cifar100"], 100),
        (LabConfig(embed_dim=30), ["--embedding=fixed"], 30),
        (LabConfig(embed_dim=30), ["--embed-dim=40"], 40),
    ):
        (tmp_path / "a.json").write_text(json.dumps(config.saved()))
        found = lab.read_command_line("train", [f"--config={tmp_path / 'a.json'}", *flags])[0]
        assert found.dim == dim
    (tmp_path / "b.json").write_text('{"embed_dim": 20}')  # by hand
    file = f"--config={tmp_path / 'b.json'}"
    assert lab.read_command_line("train", [file, "--dataset=cifar100"])[0].dim == 20
    (tmp_path / "a.json").write_text(json.dumps(LabConfig(num_blocks=3).saved()))
    untrained(tmp_path, LabConfig(num_blocks=3, embed_dim=30))
    flags = ["train", "--resume", f"--config={tmp_path / 'a.json'}", f"--output-dir={tmp_path}"]
    refused(capsys, 2, flags, "--embed-dim 20 contradicts")


def test_the_twins_threads_are_a_setting_that_a_file_may_have(tmp_path):
    """Their number is --threads where no file says another; that flag, where given, wins."""
    (tmp_path / "a.json").write_text('{"step_threads": 3}')
    twin, flag, file = ["--objective=backprop"], "--threads=2", f"--config={tmp_path / 'a.json'}"
    last = [*twin, flag, file, "--step-threads=4"]
    for flags, threads in (([*twin, flag], 2), ([*twin, file], 3), ([*twin, flag, file], 2), (last, 4)):
        assert lab.read_command_line("train", flags)[0].step_threads == threads


@pytest.mark.parametrize("main", [noprop.main, lab.main])
def test_an_answer_takes_one_thread(main, tmp_path, monkeypatch):
    """The script and the lab set that for a while: before and after there are two."""
    path, threads = untrained(tmp_path), []

    def probabilities(_, images: torch.Tensor) -> torch.Tensor:
        threads.append(torch.get_num_threads())
        return torch.full((len(images), 1, 10), 0.1)

    monkeypatch.setattr(noprop.NoProp, "probabilities", probabilities)
    torch.set_num_threads(2)
    arguments = ["predict", str(path)] if main is lab.main else ["--predict", str(path)]
    assert main([*arguments, str(ROOT / "docs/img/digits.jpg")]) == 0
    assert threads == [1] and torch.get_num_threads() == 2


def test_a_part_may_be_of_any_number_of_blocks():
    for flags in (
        ["--num-blocks=12", "--blocks=9-12"],
        ["--dataset=fashion_mnist", "--num-blocks=10", "--blocks=4-10"],
    ):
        config = lab.read_command_line("train", ["--embedding=fixed", *flags])[0]
        assert config.own_blocks[-1] == config.num_blocks and config.select == "last"


@pytest.mark.parametrize(
    ("settings", "flag"), [({"temperature": 1}, "--weights=ddpm"), ({"all_images": True}, "--select=last")]
)
def test_flags_win_over_what_a_file_would_contradict_without_them(settings, flag, tmp_path):
    (path := tmp_path / "a.json").write_text(json.dumps(settings))
    assert settings.items() <= vars(lab.read_command_line("train", [f"--config={path}", flag])[0]).items()
    if "temperature" in settings:
        assert noprop.read_command_line([f"--config={path}", flag])[0].temperature == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "cosine", "eta_min": 1e-4},
        {"select": "validation", "patience": 2},
        {"embedding": "learned", "embed_wd": 0.1},
    ],
)
def test_a_search_asks_for_what_another_of_its_settings_gives_an_effect(settings, monkeypatch):
    config = LabConfig(schedule="constant", select="last", embedding="fixed")
    monkeypatch.setattr(noprop, "suggest", lambda _: settings)
    assert search.space_of(config)(optuna.trial.FixedTrial({})) == settings
    monkeypatch.setattr(noprop, "suggest", lambda _: dict([[*settings.items()][1]]))
    assert search.space_of(config)(optuna.trial.FixedTrial({})) == {}


def test_patience_of_a_run_that_selects_the_last_epoch(tmp_path, capsys):
    untrained(tmp_path, LabConfig(num_blocks=1, select="last"))
    with pytest.raises(noprop.Failure, match="patience has no effect with select last"):
        noprop.read_command_line(["--resume", "--patience=3", f"--output-dir={tmp_path}"])
    refused(capsys, 2, ["train", "--resume", "--patience=3", f"--output-dir={tmp_path}"], "--patience 3")


def test_a_search_leaves_out_what_an_objective_does_not_know_or_what_does_nothing():
    names = ("lr", "eta_loss_weight", "lambda_global", "embed_wd", "weight_decay")
    values = {name: 1e-3 if name == "embed_wd" else 0.1 for name in names}
    idle, weights = {"embed_wd"}, {"eta_loss_weight", "lambda_global"}
    for config, missing in (
        (LabConfig(), set()),
        (LabConfig(embedding="fixed"), idle),
        (DTConfig(), {"lambda_global"}),
        (BackpropConfig(), weights | idle),
        (BackpropConfig(target="classes"), weights),
    ):
        found = search.space_of(config)(optuna.trial.FixedTrial(values))
        assert set(values) - set(found) == missing and replace(config, **found)
        search.space_of(config)(trial := optuna.create_study().ask())  # nor is Optuna asked for it
        assert trial.params.keys() == found.keys()


@pytest.fixture(scope="module")
def two_networks(tmp_path_factory) -> list[Path]:
    """F, of MNIST, and K, of KMNIST: checkpoints of networks that were not trained."""
    folder = tmp_path_factory.mktemp("networks")
    configs = LabConfig(num_blocks=3), LabConfig(num_blocks=3, dataset="kmnist")
    pairs = zip("FK", configs, strict=True)
    return [untrained(folder, config).rename(folder / name) for name, config in pairs]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("train --objective dt --lambda-global 2", "lambda_global has no effect on this objective"),
        ("train --objective dt --eta-loss-weight 0", "learn nothing"),
        (
            "train --objective dt --embedding fixed --blocks 1-2",
            "blocks take turns without --updates last: leave out blocks",
        ),
        ("train --objective backprop --eta-loss-weight 1", "eta_loss_weight has no effect on this objective"),
        ("train --objective backprop --blocks 1 --embedding fixed", "backprop trains one network as a whole"),
        ("train --objective cascade --blocks 1", "blocks of a cascade learn from those before them"),
        ("train --objective infobatch --blocks 1", "images are left out by the losses of all blocks"),
        ("train --objective infobatch --prune-ratio 1", "prune_ratio must be below 1"),
        ("train --objective infobatch --anneal-from 1.5", "anneal_from must be at most 1"),
        ("train --prune-ratio 0.5", "--prune-ratio is no flag here"),
        ("train --embed-scale 0", "embed_scale 0 makes all labels the same"),
        ("train --embedding-from F --embed-scale 2", "leave --embed-scale out"),
        ("train --objective cascade --embed-wd 0.1", "embed_wd has no effect on this objective"),
        ("train --embedding fixed --embed-wd 0.1", "embed_wd has no effect with embedding fixed"),
        ("train --objective dt --select last --patience 3", "patience has no effect with select last"),
        ("train --objective backprop --embed-scale 2", "embed_scale has no effect as no"),
        ("train --objective backprop --embedding fixed", "embedding has no effect as no"),
        ("train --objective backprop --embedding-from F", "embedding_from has no effect as no"),
        ("train --objective backprop --target classes --embedding fixed --embed-wd 0.1", "embed_wd has no"),
        ("search --no-run-hpo", "--run-hpo is a command: python -m noprop_lab search"),
        ("train --objective cascade --temperature 1", "temperature has no effect on this objective"),
        ("train --objective backprop --temperature 1", "without --weights learned, backprop takes no"),
        ("train --objective backprop --classify z", "without --weights learned, backprop takes no"),
        ("train --objective dt --weights learned", "weights"),
        ("train --objective dt --num-blocks 50 --weights equal --temperature 0", "learn nothing: take ddpm"),
        ("train --objective backprop --step-threads 0", "step_threads must be at least 1"),
        ("train --objective cascade --preset paper", "--preset paper is a setting of --objective dt"),
        ("train --objective ct --preset reference", "--preset reference does not go with --objective ct"),
        ("train --objective none", "--objective"),
        ("train --embedding onehot --embed-dim 30", "embedding onehot has 10 dimensions"),
        ("train --dataset cifar10 --classes a b", "classes are those of dataset folder"),
        ("train --dataset svhn", "--dataset"),
        ("train --config none.json", "cannot use none.json as hpo_best.json: No such file"),
        ("train --config speed.json", "cannot use speed.json: speed is no setting of this"),
        ("train --config svhn.json", "dataset can't be"),
        ("train --config deep.json", "cannot use deep.json"),
        ("train --blocks= --data-root=none", "--blocks= is empty"),
        ("search --hpo-storage= --data-root=none", "--hpo-storage= is empty"),
        ("weights F none/x.pt", "there is no folder none"),
        ("merge a b --checkpoint-minutes 1", "merge takes no --checkpoint-minutes"),
        ("train --image-size 20", "image_size must be at least 28"),
        ("train --dataset folder --classes a b --image-size 1025", "image_size must be at least 28, and at"),
        ("train --objective ct --threads 1025", "threads must be at most 1024 here"),
        ("train --objective backprop --threads 1025", "threads must be at most 1024 here"),
        ("train --image-size 64", "image_size is of dataset folder"),
        ("train --evaluate F", "--evaluate is a command: python -m noprop_lab evaluate"),
        ("train --predict=F a.png", "--predict is a command: python -m noprop_lab predict"),
        ("train --run_hpo", "--run-hpo is a command: python -m noprop_lab search"),
        ("merge F F --evaluate F", "--evaluate is a command"),
        ("train --hpo-timeout 3", "hpo_timeout is of a search"),
        ("merge a b --hpo-trials 3", "hpo_trials is of a search"),
        ("train --all-images", "all_images leaves none to select by: it takes select last"),
        ("train --early-exit 0.5", "early_exit goes with evaluate or predict"),
        ("train --speed 1", "--speed"),
        ("evaluate F --early-exit 0", "early_exit must be above 0"),
        ("evaluate F --early-exit 0.5 --temperature 1 --weights ddpm", "--early-exit does not sample"),
        ("evaluate F --lr 1", "--lr 1.0 contradicts F, which has 0.014"),
        ("evaluate F --config ten.json", "--num-blocks 10 contradicts F, which has 3"),  # though a default
        ("evaluate F --blocks 1", "take all blocks, not 1 alone"),
        ("evaluate F --objective dt", "--objective dt contradicts F, which has hybrid"),
        ("evaluate F --preset paper", "preset"),
        ("evaluate F --dataset kmnist", "--dataset kmnist contradicts F, which has mnist"),
        ("evaluate K --dataset mnist", "--dataset mnist contradicts K, which has kmnist"),
        ("evaluate F --resume", "choose one of"),
        ("evaluate", "--evaluate"),
        ("predict", "--predict: expected at least one argument"),
        ("predict F", "a checkpoint and then at least one image file"),
        ("predict F none.png", "cannot read the image none.png"),
        (f"predict F none.png --threads {noprop.Options.threads + 1}", "threads has no use here"),
        ("search --select last --patience 3 --data-root=none", "patience has no effect with select last"),
        ("search --blocks 1 --embedding fixed", "take all blocks, not 1 alone"),
        ("search --embedding-from F", "--embedding-from is of training"),
        ("search --all-images --select last", "a search judges whole networks by validation images"),
        ("search --config part.json", "a search judges whole networks by validation images"),
        ("merge", "merge takes the checkpoints of parts"),
        ("merge F", "F is a whole network: merge takes two checkpoints at least"),
        ("merge a b --threads x", "--threads: invalid int value: 'x': see --help\n"),
        ("demo --bogus 1", "--bogus is no flag here: see --help\n"),
        ("evaluate K --config set.json", "--dataset mnist contradicts K, which has kmnist"),
        ("merge a b --lr 99", "merge takes no --lr"),
        ("merge a b --preset paper", "merge takes no --preset"),
        ("merge --objective dt a b", "merge takes no --objective"),
        ("merge a b --resume", "merge takes no --resume"),
        ("merge a b --graphs", "merge takes no --graphs"),
        ("evaluate F --graphs", "--graphs is of training"),
        ("predict F a.png --graphs", "--graphs is of training"),
        ("evaluate none.pt", "cannot read none.pt: No such file"),
    ],
)
def test_what_is_refused_is_named(arguments, word, two_networks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path in two_networks:
        shutil.copy(path, tmp_path)
    (tmp_path / "ten.json").write_text('{"num_blocks": 10}')
    (tmp_path / "speed.json").write_text('{"speed": 1}')
    (tmp_path / "set.json").write_text('{"dataset": "mnist"}')
    (tmp_path / "svhn.json").write_text('{"dataset": {"svhn": []}}')
    (tmp_path / "deep.json").write_text("[" * 200_000)
    part = {"blocks": "1-2", "embedding": "fixed", "select": "last"}
    (tmp_path / "part.json").write_text(json.dumps(part))
    before = set(tmp_path.iterdir())
    refused(capsys, 2, arguments.split(), word)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_the_machine_lacks_is_exit_code_1(tmp_path, capsys):
    for arguments in (["train", "--graphs"], ["search", "--graphs"], ["train", "--device", "cuda"]):
        refused(capsys, 1, [*arguments, f"--output-dir={tmp_path}"], arguments[1])
    refused(capsys, 2, ["train", "--device", "no"], "--device no can't be used")


def test_help_and_usage(capsys):
    assert lab.main([]) == lab.main(["--help"]) == 0
    assert "merge CHECKPOINTS" in capsys.readouterr().out
    assert lab.main(["fly"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: fly is no command\nusage: ") and "merge CHECKPOINTS" in errors
    assert lab.main(["predict", "--help"]) == 0
    assert "noprop_lab predict CHECKPOINT PICTURES ... [flags]" in capsys.readouterr().out
    for flags in ("search --hpo-trials 3", "evaluate F --early-exit 0.9", "weights"):
        assert lab.main([*flags.split(), "--help"]) == 0
    assert "--early-exit" in capsys.readouterr().out
    assert lab.main(["train", "--objective", "dt", "--help"]) == 0
    assert "--updates" in capsys.readouterr().out  # which other objectives have not


@pytest.mark.parametrize("kinds", [*((x, LabOptions) for x in CONFIGS.values()), (DemoOptions,)])
def test_every_setting_is_a_flag(kinds, capsys):
    """Flags are read off the source, where a field that has no comment, or is in two lines, has none."""
    with pytest.raises(SystemExit):
        noprop.read_flags(["--help"], *kinds)
    shown = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    names = {field.name for kind in kinds for field in fields(kind)}
    assert {f"--{name.replace('_', '-')}" for name in names} <= shown


# --- Going on ----------------------------------------------------------------------------------------------


def test_a_bare_resume_goes_on_with_the_objective_that_is_there(tmp_path, capsys):
    folder = f"--output-dir={tmp_path}"
    assert lab.main(["train", *flags_of(tmp_path, "--objective=dt", num_blocks=2)]) == 0
    assert lab.main(["train", "--resume", "--epochs=2", folder]) == 0
    assert "resuming, 4 steps are done" in capsys.readouterr().out
    content = contents(tmp_path / "noprop_dt.pt")
    assert content["training"]["step"] == 8 and content["config"]["epochs"] == 2
    refused(capsys, 2, ["--resume", folder], "python -m noprop_lab train --resume", main=noprop.main)
    refused(capsys, 2, ["train", "--resume", "--objective=dt", "--lr=1", folder], "--lr 1.0 contradicts")
    assert lab.main(["train", *flags_of(tmp_path, num_blocks=2)]) == 0
    refused(capsys, 2, ["train", "--resume", folder], "several runs: add --objective")


def test_an_embedding_that_a_run_does_not_have_is_refused(tmp_path, capsys):
    other = untrained(tmp_path / "other", LabConfig(num_blocks=3, seed=1))
    own = untrained(tmp_path / "own", LabConfig(num_blocks=3))
    start = ["train", "--resume", f"--output-dir={tmp_path}"]
    untrained(tmp_path, LabConfig(num_blocks=3, embedding="fixed"))
    assert lab.read_command_line("train", [*start[1:], f"--embedding-from={own}"])[2]
    refused(capsys, 2, [*start, f"--embedding-from={other}"], "is not the embedding that", str(other))
    untrained(tmp_path)
    refused(capsys, 2, [*start, f"--embedding-from={own}"], "--embedding fixed contradicts")
    wide = untrained(tmp_path / "wide", LabConfig(num_blocks=3, embed_dim=30))
    refused(capsys, 2, ["train", f"--embedding-from={wide}"], "has embed_dim 30, this network 20")
    more = ["train", "--dataset=cifar100", f"--embedding-from={own}"]
    refused(capsys, 2, more, "has classes 10, this network 100")


def test_a_networks_data_set_may_bring_settings_that_the_run_had_otherwise(tmp_path):
    """Of Fashion-MNIST with the small block: its own default is the deep one."""
    path = untrained(tmp_path, LabConfig(num_blocks=3, dataset="fashion_mnist", epochs=2))
    resume = ["--resume", f"--output-dir={tmp_path}"]
    for command, flags in (("train", resume), ("evaluate", [str(path)]), ("predict", [str(path), "a"])):
        assert lab.read_command_line(command, [*flags, "--dataset=fashion_mnist"])[0].block == "small"


# --- Whose checkpoint is read by whom ----------------------------------------------------------------------


def test_the_script_reads_what_the_lab_writes_of_its_recipe_and_the_lab_reads_the_scripts(tmp_path, capsys):
    assert lab.main(["train", *flags_of(tmp_path / "lab")]) == 0
    assert noprop.main(flags_of(tmp_path / "script")) == 0
    mine, yours = (tmp_path / name / "noprop_hybrid.pt" for name in ("lab", "script"))
    a, b = (contents(x) for x in (mine, yours))
    assert a["config"] == b["config"]
    assert all(torch.equal(x, b["model"][name]) for name, x in a["model"].items())
    capsys.readouterr()
    assert noprop.main(["--evaluate", str(mine)]) == noprop.main(["--evaluate", str(yours)]) == 0
    one, other = capsys.readouterr().out.splitlines()
    assert one == other and noprop.load(mine).config == noprop.load(yours).config
    assert lab.main(["evaluate", str(yours)]) == 0
    assert noprop.main(["--resume", f"--output-dir={tmp_path / 'lab'}"]) == 0
    assert lab.main(["train", "--resume", f"--output-dir={tmp_path / 'lab'}"]) == 0


@pytest.mark.parametrize(
    "config",
    [
        LabConfig(num_blocks=2, dataset="kmnist"),
        LabConfig(num_blocks=2, dataset="folder", classes=("a", "b")),
        LabConfig(num_blocks=2, embedding="onehot"),
        LabConfig(num_blocks=2, block="paper"),
        LabConfig(num_blocks=2, classify="z"),
        DTConfig(num_blocks=2),
        DTConfig(num_blocks=2, classify="u_hat"),
        BackpropConfig(num_blocks=2),
        CascadeConfig(num_blocks=2, hand_on="label"),
        InfoBatchConfig(num_blocks=2, prune_ratio=0.25),
    ],
)
def test_the_script_refuses_what_is_the_labs_and_names_it(config, tmp_path, capsys):
    path = untrained(tmp_path, config)
    for arguments in (["--evaluate", str(path)], ["--predict", str(path), "a.png"]):
        refused(capsys, 2, arguments, "is the lab's: use python -m noprop_lab", main=noprop.main)
    with pytest.raises(noprop.Failure, match="python -m noprop_lab"):
        noprop.load(path)
    found = load(path).config
    assert type(found) is type(config)
    assert vars(found) | {"embed_dim": None} == vars(config) | {"embed_dim": None}


@pytest.mark.parametrize("main", [noprop.main, lab.main])
def test_a_checkpoint_whose_weights_are_not_those_of_its_settings(tmp_path, capsys, main):
    """As those of a block of the reader's own, which the settings do not name."""
    content = contents(path := untrained(tmp_path, LabConfig(num_blocks=2)))
    command = ["--evaluate" if main is noprop.main else "evaluate", str(path)]
    for change in ({"config": content["config"] | {"num_blocks": 3}}, {"model": {}}, {"model": None}):
        torch.save(content | change, path)
        refused(capsys, 2, command, f"{path} does not hold the weights of its settings", main=main)


def test_a_part_of_a_network_is_no_network(tmp_path, capsys):
    path = untrained(tmp_path, replace(PARTS, num_blocks=3))
    for read, word in ((load, "holds blocks 1-2 alone"), (noprop.load, "noprop_lab")):
        with pytest.raises(noprop.Failure, match=word):
            read(path)
    refused(capsys, 2, ["evaluate", str(path)], "holds blocks 1-2 alone", "merge")
    refused(capsys, 2, ["predict", str(path), "a.png"], "holds blocks 1-2 alone")
    refused(capsys, 2, ["weights", str(path), str(tmp_path / "x.pt")], "holds blocks 1-2 alone")
    refused(capsys, 2, ["train", f"--embedding-from={path}"], "holds blocks 1-2 alone")
    refused(capsys, 2, ["--evaluate", str(path)], "noprop_lab", main=noprop.main)
