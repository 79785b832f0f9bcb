"""Bugs of meaning, as people make them: what benchmarks/mutants.py plants beside the operators' mutants.

Each is a name, the text that it replaces, which occurs once in the file, and what stands there instead.
"""

from typing import NamedTuple

SCRIPT, LAB = "noprop_example.py", "noprop_lab"


class Bug(NamedTuple):
    name: str
    file: str
    old: str
    new: str


SCHEDULE_AND_MODEL = [
    ("the schedule is not clamped", ".square().clamp(1e-3, 0.999)", ".square()"),
    (
        "inference: one noise level off",
        "level, a, b, c = self.steps[t - 1]",
        "level, a, b, c = self.alpha_bar[t].item(), *self.steps[t - 1][1:]",
    ),
    (
        "temperature 1: z_0 = 0",
        "return temperature * send(torch.randn(shape, generator=noise), image.device)",
        "return image.new_zeros(shape)",
    ),
    ("temperature: z_0 is twice as large", "return temperature * send(", "return 2 * temperature * send("),
    ("temperature: noise without its root", "z = z + temperature * c**0.5 *", "z = z + temperature * c *"),
    (
        "the answer is of the block before",
        """\
            u_hat, z = self.step(t, image, z, temperature, noise)
            logits.append(self.classify(u_hat, z))""",
        """\
            before = u_hat if t > 1 else None
            u_hat, z = self.step(t, image, z, temperature, noise)
            logits.append(self.classify(u_hat if before is None else before, z))""",
    ),
    (
        "DDPM's weights and equal ones exchanged",
        'config.seed, config.weights == "equal")',
        'config.seed, config.weights != "equal")',
    ),
    ("the embedding does not start orthonormal", "nn.init.orthogonal_(self.label_embedding.weight)", "pass"),
    ("the seed does not decide the blocks' weights", 'seeded(seed, "block", t)', 'seeded(0, "block", t)'),
    ("all blocks start alike", 'seeded(seed, "block", t)', 'seeded(seed, "block")'),
    ("the seed does not decide the embedding", 'seeded(seed, "embedding")', 'seeded(0, "embedding")'),
    (
        "predict: bytes are not divided by 255",
        "return map(to_float, images.to(",
        "return map(Tensor.float, images.to(",
    ),
    (
        "predict: the answer of block 1",
        "return self.probabilities(images)[:, -1].argmax(-1)",
        "return self.probabilities(images)[:, 0].argmax(-1)",
    ),
    (
        "predict: the answer of the average",
        "return self.probabilities(images)[:, -1].argmax(-1)",
        "return self.probabilities(images).mean(1).argmax(-1)",
    ),
]

OBJECTIVE = [
    (
        "training: one noise level off",
        "level, u = alpha_bar[t - 1].item(), F.embedding(label, W)",
        "level, u = alpha_bar[t].item(), F.embedding(label, W)",
    ),
    (
        "the embedding is detached in z",
        "z = noisy_label(u, noise, level)",
        "z = noisy_label(u.detach(), noise, level)",
    ),
    (
        "the embedding is detached in the target",
        "F.mse_loss(u_hat, u), u_hat",
        "F.mse_loss(u_hat, u.detach()), u_hat",
    ),
    (
        "the block reads a detached z",
        "eps_hat = block(image, z, level, W)",
        "eps_hat = block(image, z.detach(), level, W)",
    ),
    (
        "the block reads a detached W",
        "eps_hat = block(image, z, level, W)",
        "eps_hat = block(image, z, level, W.detach())",
    ),
    (
        "the classifier's gradient does not reach block T",
        "return F.cross_entropy(classifier(u_hat), label)",
        "return F.cross_entropy(classifier(u_hat.detach()), label)",
    ),
    (
        "the classifier's loss is doubled",
        "return F.cross_entropy(classifier(u_hat), label)",
        "return 2 * F.cross_entropy(classifier(u_hat), label)",
    ),
    (
        "eta and lambda exchanged",
        "Hybrid(config.eta_loss_weight, config.lambda_global)",
        "Hybrid(config.lambda_global, config.eta_loss_weight)",
    ),
]

DATA = [
    (
        "validation images are trained on too",
        "order[held_out:][: config.train_images]",
        "order[: config.train_images]",
    ),
    (
        "the digest of the images leaves out labels",
        "(*self.train, *self.val, *(self.test or ()))",
        "(self.train.images, self.val.images, *(self.test or ())[:1])",
    ),
    (
        "shear in place of rotation",
        "torch.stack([cos, -sin, dx, sin, cos, dy]",
        "torch.stack([cos, -sin, dx, 0 * sin, cos, dy]",
    ),
    (
        "a batch is turned and shifted as one",
        "(torch.rand(4, len(images), generator=noise) * 2 - 1)",
        "(torch.rand(4, 1, generator=noise).expand(4, len(images)) * 2 - 1)",
    ),
    (
        "augmentation turns and shifts one way only",
        "(torch.rand(4, len(images), generator=noise) * 2 - 1)",
        "torch.rand(4, len(images), generator=noise)",
    ),
]

TRAINING = [
    (
        "no gradient clip",
        "clip_grad_norm_([self.parts[name]], self.config.grad_clip)",
        "clip_grad_norm_([self.parts[name]], math.inf)",
    ),
    (
        "no gradient clip of the embedding",
        "clip_grad_norm_([self.parts[name]], self.config.grad_clip)",
        'clip_grad_norm_([self.parts[name]], math.inf if "label" in name else self.config.grad_clip)',
    ),
    (
        "no gradient clip of the twin",
        "clip_grad_norm_([self.parts[name]], self.config.grad_clip)",
        "clip_grad_norm_([self.parts[name]], math.inf if self.config.objective == 'backprop' else"
        " self.config.grad_clip)",
    ),
    (
        "weight decay ten times",
        'if name == "label_embedding" else config.weight_decay',
        'if name == "label_embedding" else 10 * config.weight_decay',
    ),
    (
        "weight decay of blocks for the embedding too",
        'decay = config.embed_wd if name == "label_embedding" else config.weight_decay',
        "decay = config.weight_decay",
    ),
    (
        "the learning rate never anneals",
        "return config.eta_min + (config.lr - config.eta_min) * cosine",
        "return config.lr",
    ),
    (
        "the learning rate does not warm up",
        'warm_up = 0.2 if config.schedule == "one-cycle" else 0.0',
        "warm_up = 0.0",
    ),
    ("the same order every epoch", '"order", len(self.history))', '"order", 0)'),
    ("the same augmentation every step", '"augment", state.step)', '"augment", 0)'),
    (
        "the same noise every step",
        "generator(self.config.seed, purpose, t, self.step)",
        'generator(self.config.seed, purpose, t, self.step * (purpose != "noise"))',
    ),
    (
        "the same dropout mask every step",
        "generator(self.config.seed, purpose, t, self.step)",
        'generator(self.config.seed, purpose, t, self.step * ("dropout" not in purpose))',
    ),
    (
        "the same noise for every block",
        "generator(self.config.seed, purpose, t, self.step)",
        "generator(self.config.seed, purpose, self.step)",
    ),
    (
        "the seed does not decide the noise",
        "generator(self.config.seed, purpose, t, self.step)",
        "generator(0, purpose, t, self.step)",
    ),
    ("the embedding's gradient is the blocks' mean", "sum(gradients))", "sum(gradients) / len(steps))"),
    ("the embedding's gradient is the last block's", "sum(gradients))", "gradients[-1])"),
    (
        "the average leaves out batch-norm statistics",
        "[flatten(x), *filter(Tensor.is_floating_point, x.buffers())]",
        "[flatten(x)]",
    ),
    (
        "the average does not warm up",
        "1 - min(self.config.ema_decay, (1 + self.step) / (10 + self.step))",
        "1 - self.config.ema_decay",
    ),
    (
        "the embedding's norm is not clipped",
        "self.model.label_embedding.weight.data.renorm_(2, 0, self.config.max_norm_embed)",
        "pass",
    ),
    ("the embedding's norm: always 50", "renorm_(2, 0, self.config.max_norm_embed)", "renorm_(2, 0, 50.0)"),
    (
        "the embedding's norm: of columns",
        "renorm_(2, 0, self.config.max_norm_embed)",
        "renorm_(2, 1, self.config.max_norm_embed)",
    ),
    ("bfloat16 is ignored", 'short = config.precision == "bfloat16"', "short = False"),
    (
        "batch norm trains while the average is evaluated",
        "copy.deepcopy(self.model).eval()",
        "copy.deepcopy(self.model)",
    ),
    (
        "batch norm trains in a network that is loaded",
        'model.eval().load_state_dict(content["model"])',
        'model.load_state_dict(content["model"])',
    ),
]

SELECTION = [
    (
        "selection by test accuracy",
        """\
        best = max(x["val_accuracy"] or 0 for x in self.history)  # without validation images: None
        if self.config.select == "last" or record["val_accuracy"] >=""",
        """\
        best = max(x.get("test_accuracy", x["val_accuracy"]) for x in self.history)
        if self.config.select == "last" or record.get("test_accuracy", record["val_accuracy"]) >=""",
    ),
    (
        "selection of the first epoch within one standard error",
        'if self.config.select == "last" or record["val_accuracy"] >=',
        """\
kept = self.selected_epoch and self.config.select == "validation"
        kept = kept and self.history[self.selected_epoch - 1]["val_accuracy"]
        late = 1e9 * (kept >= best - standard_error(best, val_images))
        if self.config.select == "last" or record["val_accuracy"] - late >=""",
    ),
    ("selection of the best epoch alone", ">= best - standard_error(best, val_images)", ">= best"),
    (
        "selection within two standard errors",
        "best - standard_error(best,",
        "best - 2 * standard_error(best,",
    ),
    (
        "patience never ends",
        "return done >= self.config.epochs or late >= self.config.patience",
        "return done >= self.config.epochs",
    ),
    (
        "an epoch measures the weights, not their average",
        "evaluate(self.averaged, split",
        "evaluate(self.model.eval(), split",
    ),
    (
        "an epoch's test and validation exchanged",
        '(("val", data.val), ("test", data.test))',
        '(("val", data.test), ("test", data.val))',
    ),
    (
        "the results' test and validation exchanged",
        "for split in (data.val, data.test))",
        "for split in (data.test, data.val))",
    ),
    ("the results are of the last epoch", "model.load_state_dict(state.selected)", "model.eval()"),
    (
        "the last weights are saved, not the selected",
        '"model": self.selected,',
        '"model": self.averaged.state_dict(),',
    ),
    (
        "evaluate: validation in place of test",
        "load_data(config, options.data_root, device).test",
        "load_data(config, options.data_root, device).val",
    ),
    (
        "evaluate: images are augmented",
        "images = to_float(split.images[start : start + 500])",
        "images = augment(to_float(split.images[start : start + 500]), generator(start))",
    ),
    (
        "evaluate: the temperature is ignored",
        "model(images, config.temperature, generator(",
        "model(images, 0.0, generator(",
    ),
    ("evaluate: the same noise in every batch", '"inference", start)', '"inference", 0)'),
    (
        "evaluate: the average is block 1",
        "log_p.logsumexp(1, keepdim=True) - math.log(log_p.shape[1])",
        "log_p[:, :1]",
    ),
    (
        "evaluate: the average is of logits",
        "log_p.logsumexp(1, keepdim=True) - math.log(log_p.shape[1])",
        "log_p.mean(1, keepdim=True).log_softmax(-1)",
    ),
    (
        "evaluate: no image costs more than float32's smallest number",
        "(-log_p.gather(2, label).mean((0, 2)))",
        "(-log_p.gather(2, label).exp().clamp_min(1e-38).log().mean((0, 2)))",
    ),
    (
        "evaluate: every block has the accuracy of the last",
        'return {"accuracy": chain, "loss"',
        'return {"accuracy": chain[-1:] * len(chain), "loss"',
    ),
    (
        "the average answers where it is worse",
        'val["loss_average"] < val["loss"][-1]',
        'val["loss_average"] > val["loss"][-1]',
    ),
    (
        "the average answers where it fits test images better",
        'val["loss_average"] < val["loss"][-1]',
        'test["loss_average"] < test["loss"][-1]',
    ),
    ("predict samples the same noise in every batch", '"inference", 500 * i)', '"inference", 0)'),
    ("the average is of all blocks, after each", "found[:, :t].mean(1)", "found.mean(1)"),
    (
        "the standard error has no root",
        "return math.sqrt(accuracy * (100 - accuracy) / images)",
        "return accuracy * (100 - accuracy) / images",
    ),
]

FILES_AND_SEARCH = [
    (
        "resume: the average is not loaded",
        "zip(self.holders[name], states, strict=True)",
        "zip(self.holders[name][1:], states[1:], strict=True)",
    ),
    (
        "resume: the optimizer is not loaded",
        "zip(self.holders[name], states, strict=True)",
        "zip(self.holders[name][:2], states[:2], strict=True)",
    ),
    (
        "resume: the step counter is lost",
        'vars(self).update((name, content["training"][name])',
        'vars(self).update((name, 0 if name == "step" else content["training"][name])',
    ),
    (
        "resume: the epoch begins anew",
        "self.log, self.started = [row.to(self.device) for row in self.log],",
        "self.log, self.started = [],",
    ),
    (
        "resume: the selected weights are lost",
        'self.selected = content["model"] if self.history else self.selected',
        "self.selected = self.averaged.state_dict()",
    ),
    ("resume: other images are taken", 'if content["data"] != digest:', "if False:"),
    ("files are written in place", 'beside = path.with_name(f".{path.name}.part")', "beside = path"),
    (
        "an older checkpoint is overwritten",
        "            keep_older(options.checkpoint(state.config))\n",
        "            pass\n",
    ),
    (
        "the picture's validation curve is the test curve",
        '(accuracies, "val_accuracy",',
        '(accuracies, "test_accuracy",',
    ),
    (
        "the picture's errors are of validation images",
        'standard_error(accuracy, summary["test_images"])',
        "standard_error(accuracy, 5000)",
    ),
    ("digits are not centred by mass", "min(max(round(14 - c), 0), 28 - n)", "(28 - n) // 2"),
    ("digits fill the whole picture", "round(20 * side", "round(28 * side"),
    ("digits must be light on dark", "ink = np.abs(gray -", "ink = np.maximum(0, gray -"),
    (
        "the search judges by test images",
        "data = load_data(config, options.data_root, device)._replace(test=None)",
        "data = load_data(config, options.data_root, device); data = data._replace(val=data.test, test=None)",
    ),
    ("the search never prunes", "worse = trial.should_prune()", "pass"),
    ("the search trains with the worst trial", "best = min(complete, key", "best = max(complete, key"),
    (
        "the search does not begin with the settings given",
        "study.enqueue_trial(first, skip_if_exists=True)",
        "pass",
    ),
]

DT = [
    ("dt: no KL term", " + kl_to_noise(F.embedding(label, W), level)", ""),
    ("dt: the SNR's differences are reversed", ".diff()[t - 1].item()", ".diff()[-t].item()"),
    (
        "dt: the factor T/2 is missing",
        "weight = (len(alpha_bar) - 1) / 2 * self.config",
        "weight = self.config",
    ),
    ("dt: the classifier trains on û", 'if config.classify == "u_hat":', "if config.classify:"),
    ("dt: the classifier reads û in inference", "return self.classifier(z)", "return self.classifier(u_hat)"),
    (
        "dt: the classifier trains on z_{T-1}",
        "cosine_schedule(config.num_blocks)[-1]",
        "cosine_schedule(config.num_blocks)[-2]",
    ),
    ("dt: dropout does not scale up", ">= self.p) / (1 - self.p)", ">= self.p)"),
    (
        "dt: all dropout layers draw alike",
        'draw(f"dropout {i}", shape, kind)',
        'draw("dropout", shape, kind)',
    ),
    ("prototypes: mean in place of median", ".sort(1).values[:, (len(images) - 1) // 2]", ".mean(1)"),
]

EARLY_EXIT = [
    ("early exit: by the least probable class", "probability.amax(-1) <=", "probability.amin(-1) <="),
    ("early exit: z of the wrong images", "image[stay], z[stay]", "image[stay], z[: int(stay.sum())]"),
    ("early exit: all images went through all blocks", "used[inside] = t", "used[:] = t"),
]

BACKPROP = [
    ("twin: the loss of block 1", "if t == config.num_blocks or", "if t == 1 or"),
    ("twin: with a loss at every block, only the last one's", 'config.supervise == "every"', "False"),
    (
        "the paper's rival: û and z change places",
        "(1 - alpha) * z + alpha * u_hat",
        "alpha * z + (1 - alpha) * u_hat",
    ),
    ("the paper's rival: α is w", "self.blocks[t - 1].w.tanh()", "self.blocks[t - 1].w"),
    ("the paper's rival: z_0 = 0 in training", "if config.temperature:", "if False:"),
    ("the paper's rival: its classifier reads û", 'z if self.config.classify == "z" else u_hat', "u_hat"),
    ("the paper's rival: α starts at 0.46", "torch.tensor(0.5).atanh()", "torch.tensor(0.5)"),
    ("twin: the same dropout mask in every block", "partial(state.draw, t)", "partial(state.draw, 1)"),
    (
        "twin: the embedding is never trained",
        'through_w = config.target == "classes" and config.learns_embedding',
        "through_w = False",
    ),
]

PARTS = [
    (
        "merge: two blocks exchanged",
        '    inside = tuple(f"{name}." for name in names)\n',
        """\
    inside, model = tuple(f"{name}." for name in names), part["model"]
    own = [f"{name}." for name in names if name.startswith("blocks.")]
    for a, b in zip(own[:1], own[1:2]):
        for key in [key for key in model if key.startswith(a)]:
            other = b + key.removeprefix(a)
            model[key], model[other] = model[other], model[key]
""",
    ),
    (
        "merge: averages and optimizers are the first file's",
        'mine["parts"].update({name: more["parts"][name] for name in names})',
        "pass",
    ),
]

FOUND_BY_READING = [  # by somebody who looked for what all tests of then would survive
    (f"{LAB}/infobatch.py", "self.losses < self.losses.nanmean()", "self.losses > self.losses.nanmean()"),
    (f"{LAB}/infobatch.py", "1 + below * config.prune_ratio / (1 - config.prune_ratio)", "1 + 0.0 * below"),
    (f"{LAB}/infobatch.py", "(epoch < config.anneal_from * config.epochs)", "(epoch < config.epochs)"),
    (f"{LAB}/infobatch.py", "if not self.log:  # an epoch", "if True:  # an epoch"),
    (f"{LAB}/infobatch.py", '(*State.POSITION, "losses", "counts")', '(*State.POSITION, "counts")'),
    (f"{LAB}/infobatch.py", "if len(kept) < config.batch_size:", "if not len(kept):"),
    (f"{LAB}/infobatch.py", "(self.weight * each).mean()", "each.mean()"),
    (f"{LAB}/infobatch.py", "weight.copy_(state.counts[batch])", "weight.copy_(state.counts[: len(batch)])"),
    (f"{LAB}/infobatch.py", "sum(objective.losses[t] for t in state.blocks)", "objective.losses[1]"),
    (SCRIPT, "state.record(record, len(data.val.labels))", "state.record(record, len(data.train.labels))"),
    (SCRIPT, "[: images // self.config.batch_size]", "[:]"),
    (SCRIPT, "replace(config, **best.user", "replace(config, epochs=options.hpo_epochs, **best.user"),
    (SCRIPT, 'if self.target == "noise":', 'if self.target == "nose":'),
    (SCRIPT, "1 - min(self.config.ema_decay, (1 + self.step)", "1 - min(1.0, (1 + self.step)"),
    (SCRIPT, "or stop or time.monotonic() > saved + 60 * options.checkpoint_minutes:", "or stop:"),
    (SCRIPT, "signal.getsignal(number) != signal.SIG_IGN", "True"),
    (SCRIPT, "except (MemoryError, RuntimeError) as error", "except RuntimeError as error"),
    (SCRIPT, "certainty.argsort()", "certainty.argsort(descending=True)"),
    (SCRIPT, "torch.use_deterministic_algorithms(True)", "pass"),
    (SCRIPT, "ImageOps.exif_transpose(file).convert", "file.convert"),
    (SCRIPT, "x / 256", "x"),
    (
        f"{LAB}/dt.py",
        "F.cross_entropy(classifier(classified(self.config, u_hat, label, W, draw))",
        "F.cross_entropy(classifier(u_hat)",
    ),
    (f"{LAB}/dt.py", "skipped = Residual(", "skipped = nn.Sequential("),
    (f"{LAB}/dt.py", "patience=epochs", "patience=15"),
    (f"{LAB}/dt.py", "seed_dropout(block, draw)\n        return", "return"),
    (f"{LAB}/flows.py", "model.load_state_dict(state.selected)", "model.eval()"),
    (
        f"{LAB}/flows.py",
        "evaluate(model, data.val, config, parallel)",
        "evaluate(model, data.test, config, parallel)",
    ),
    (f"{LAB}/backprop.py", "config.temperature * state.draw(", "state.draw("),
    (f"{LAB}/dt.py", "(32, True), (64, False), (128, True)", "(32, False), (64, True), (128, True)"),
    (f"{LAB}/flows.py", "self.start(image, temperature, noise)", "self.start(image)"),
    (f"{LAB}/flows.py", "self.step(t, code, z, temperature, noise)", "self.step(t, code, z)"),
    (f"{LAB}/flows.py", '"cifar10": 500', '"cifar10": 50'),
    (f"{LAB}/networks.py", '"by_average", "made_with")', '"made_with")'),
    (f"{LAB}/parallel.py", "SAVE * (time.monotonic() > due)", "0"),
    (f"{LAB}/parts.py", "exchange=not configs[0].blocks", "exchange=False"),
    (f"{LAB}/search.py", "return content if fits", "return content if content"),
    (f"{LAB}/parts.py", 'content["data"] != contents[0]["data"]', "False"),
    (f"{LAB}/parts.py", "operator.ne(*steps)", "False"),
    (SCRIPT, "_replace(test=None)  # augment may be searched too", "_replace(test=None, augment=augment)"),
    (SCRIPT, "(fixed, judged_by, source_of(suggest))", "(fixed, judged_by)"),
    (SCRIPT, "classes_in(z, W, level)", "classes_in(z, W, model.alpha_bar[0].item())"),
    (SCRIPT, "model.start(image, 1.0, noise), model", "model.start(image, 0.0, noise), model"),
    (SCRIPT, ', "torch": str(torch.__version__)}', "}"),
    (SCRIPT, 'if content["made_with"] != made_with(self.device):', "if True:"),
    (SCRIPT, "model = build(config, device, content)", 'model = build(content["config"], device, content)'),
    (
        SCRIPT,
        "model.probabilities(x)[:, -1], options.predict",
        "model.probabilities(x)[:, 0], options.predict",
    ),
    (SCRIPT, "augment if config.augment else None)", "augment)"),
    (
        SCRIPT,
        "(~state.log[-1].isfinite()).nonzero()",
        "(~state.log[-1][: len(state.parts) - 1].isfinite()).nonzero()",
    ),
    (SCRIPT, "saved + 60 * options.checkpoint_minutes", "saved + 3600 * options.checkpoint_minutes"),
    (SCRIPT, "                saved = time.monotonic()\n", ""),
    (SCRIPT, 'name = str(found) if options.device == "auto"', 'name = "cpu" if options.device == "auto"'),
    (SCRIPT, "samplers.TPESampler(seed=seed)", "samplers.RandomSampler(seed=seed)"),
    (
        SCRIPT,
        'self.selected = content["model"] if self.history else self.selected',
        'self.selected = content["model"]',
    ),
    (SCRIPT, "for name in self.POSITION)", 'for name in set(self.POSITION) - {"seconds"})'),
    (SCRIPT, '{test["accuracy_average"]:.2f}', '{val["accuracy_average"]:.2f}'),
    (
        SCRIPT,
        "standard_error(chain[-1], images):.2f} % (± for",
        "standard_error(chain[-1], 5000):.2f} % (± for",
    ),
    (SCRIPT, "return 128 + signal.SIGINT", "return 1"),
    (
        SCRIPT,
        'read_checkpoint(path))["config"], torch.device(device), content)',
        'read_checkpoint(path))["config"], CPU, content)',
    ),
    (SCRIPT, 'os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")', "pass"),
    (SCRIPT, "with torch.random.fork_rng(devices=[]):", "with ExitStack():"),
    (f"{LAB}/data.py", "for train in (True, False)]", "for train in (False, True)]"),
    (f"{LAB}/data.py", "permute(0, 3, 1, 2)", "permute(0, 3, 2, 1)"),
    (
        f"{LAB}/pictures.py",
        "return turned(torch.from_numpy(np.stack(found)).unsqueeze(1))",
        "return torch.from_numpy(np.stack(found)).unsqueeze(1)[None]",
    ),
    (
        f"{LAB}/data.py",
        '("test", "testing", "val", "valid", "validation")',
        '("val", "validation", "test", "testing")',
    ),
    (f"{LAB}/__main__.py", "names = config.classes or", "names = config.classes[1:] + config.classes[:1] or"),
    (
        f"{LAB}/parts.py",
        "noprop.keep_older(path := options.checkpoint(config))",
        "path = options.checkpoint(config)",
    ),
    (f"{LAB}/parts.py", '{"dataset", "image_size",', '{"image_size",'),
    (f"{LAB}/networks.py", "if self.config.blocks:", "if False:"),
    (f"{LAB}/__main__.py", 'CONFIGS[named or "hybrid"], LabOptions)', "LabConfig, LabOptions)"),
    (f"{LAB}/flows.py", "with state.config.threads_of_step(image.device):", "if True:"),
    (f"{LAB}/parallel.py", "len({*digests}) > 1", "len({*digests}) > 2"),
    (
        f"{LAB}/parallel.py",
        "            due = time.monotonic() + 60 * options.checkpoint_minutes\n",
        "            pass\n",
    ),
    (f"{LAB}/parallel.py", "if not started:", "if started:"),
    (f"{LAB}/parallel.py", 'device=f"cuda:{number}"', 'device="cuda:0"'),
    (f"{LAB}/networks.py", "network_of(content, path)\n    names", "names"),
    (f"{LAB}/__main__.py", "options.early_exit), options.port", "0.99), options.port"),
    (f"{LAB}/demo.py", ' and config.weights != "learned"', ""),
    (f"{LAB}/search.py", ">= 8", ">= 800"),
    (f"{LAB}/data.py", "followlinks=True", "followlinks=False"),
    (f"{LAB}/data.py", "x.suffix.lower()", "x.suffix"),
    (SCRIPT, "[x for x in (error, error.__context__)", "[x for x in (error,)"),
    (SCRIPT, 'if not x and getattr(spaces[k], "log", 0)', "if False"),
    (SCRIPT, 'getattr(stream, "reconfigure", dict)(errors', "stream.reconfigure(errors"),
    (SCRIPT, "if number := signalled():\n            say", "if number := 0:\n            say"),
    (
        SCRIPT,
        'np.array([record["val_accuracy"], record["test_accuracy"]], float)',
        '(record[x] or math.nan for x in ("val_accuracy", "test_accuracy"))',
    ),
    (f"{LAB}/search.py", "trial.params, trial.distributions = {}, {}", "pass"),
    (
        f"{LAB}/search.py",
        "    @wraps(noprop.suggest)  # so that a study of the script's has the same name\n",
        "",
    ),
    (f"{LAB}/data.py", " if name in there else ()", ""),
    (f"{LAB}/dt.py", "draw, self.draw = self.draw, None", "draw = self.draw"),
    (f"{LAB}/search.py", "| (set() if by_trial else config.idle)", ""),
    (SCRIPT, 'state.config.epochs > content["config"].epochs', "False"),
    (f"{LAB}/__main__.py", "idle = [x for x in given if x in config.idle and", "idle = [x for x in () if"),
    (f"{LAB}/parts.py", "if state.finished():", "if state:"),
    (
        f"{LAB}/search.py",
        "fits = there == (config.saved(), images, device)",
        "fits = there[:2] == (config.saved(), images)",
    ),
    (f"{LAB}/__main__.py", "    return found | flags", "    return flags | found"),
    (
        f"{LAB}/__main__.py",
        '(file | flags).get("block", own.get("block")) != own.get("block")',
        '(file | flags).get("block")',
    ),
    (SCRIPT, "vars(config) | config.saved()", "config.saved()"),
    (
        f"{LAB}/parallel.py",
        'if "TORCHELASTIC_RUN_ID" in os.environ else None',
        'if "LOCAL_RANK" in os.environ else None',
    ),
    (SCRIPT, "code = code or failure.code", "code = failure.code"),
    (f"{LAB}/__main__.py", 'if "threads" in named and issubclass(kind, WholeConfig):', "if False:"),
    (f"{LAB}/pictures.py", "min(picture.size) // least", "9"),
    (f"{LAB}/data.py", " or {x.lower() for x in names} <= {*TRAIN, *TEST}", ""),
    (
        f"{LAB}/data.py",
        "dict.fromkeys(x for x in (root, train, test) if x)",
        "dict.fromkeys(x for x in (root, train) if x)",
    ),
    (f"{LAB}/search.py", "1 if missing else code", "code"),
    (
        SCRIPT,
        "    with workers(device, options.threads) as parallel:\n        if options.predict",
        "    if parallel := map:\n        if options.predict",
    ),
    (f"{LAB}/__main__.py", "with noprop.workers(device, options.threads) as pool:", "if pool := map:"),
    (f"{LAB}/parallel.py", "if self.gathered == self.step:", "if self.gathered >= 0:"),
    (f"{LAB}/networks.py", "with shared_by(1):", "if True:"),
    (SCRIPT, "(1, 2**31 - 1) if kinds", "(1, sys.float_info.max) if kinds"),
    (SCRIPT, 'idle = ("output_dir", "checkpoint_minutes")', 'idle = ("checkpoint_minutes",)'),
    (SCRIPT, "None if sys.stdout else True", "None"),
    (SCRIPT, "The runtime optuna version|", ""),
    (SCRIPT, "|'utf-8'", ""),
    (SCRIPT, ".shape} or not alike:", ".shape}:"),
    (SCRIPT, 'self.by_average = content.get("by_average", False)', "pass"),
    (SCRIPT, "if idle := [x for x in given if x in IDLE", "if idle := [x for x in () if x in IDLE"),
    (SCRIPT, 'action="extend"', 'action="store"'),
    (SCRIPT, ' and self.schedule != "constant"', ""),
    (SCRIPT, "[x for _, x in steps if x is not None]", "[x for _, x in steps]"),
    (f"{LAB}/settings.py", "for name, (by, choice) in IDLE.items() if", "for name, (by, choice) in () if"),
    (f"{LAB}/search.py", "except UnicodeEncodeError as error", "except KeyError as error"),
    (f"{LAB}/search.py", ", *(by for by, _ in noprop.IDLE.values())}", ', "embedding"}'),
    (f"{LAB}/__main__.py", "(options.run_hpo and deciding())", "options.run_hpo"),
    (f"{LAB}/__main__.py", '{"epochs", "patience"} - saved.idle', '{"epochs", "patience"}'),
    (f"{LAB}/__main__.py", "kind = options.objective or", "kind = options.named_objective or"),
    (f"{LAB}/parts.py", "np.allclose(*rates, rtol=1e-9, atol=0)", "True"),
    (f"{LAB}/pictures.py", "max(1, round(size * side", "max(0, round(size * side"),
    (f"{LAB}/cascade.py", 'self.hand_on == "nothing" and self.estimates == "averaged"', "False"),
    (f"{LAB}/parallel.py", "signal.signal(number, lambda *_: None)", "signal.signal(number, signal.SIG_IGN)"),
    (SCRIPT, '{"parts", *self.POSITION} <= content.get("training", {}).keys()', '"training" in content'),
    (SCRIPT, 'r"(--[\\w-]+=)?"', 'r"--[\\w-]+="'),
    (SCRIPT, '(*idle, "data_root", "threads") if self.predict else idle', "idle"),
    (f"{LAB}/__main__.py", "TypeError, AttributeError, RecursionError)", "TypeError, AttributeError)"),
    (f"{LAB}/__main__.py", '    names += ("checkpoint_minutes",)\n', ""),
    (f"{LAB}/parts.py", ', len(x["training"]["history"])', ""),
    (f"{LAB}/parts.py", "torch.allclose(*W, rtol=0, atol=1e-5)", "torch.equal(*W)"),
    (f"{LAB}/search.py", 'if fits and config.embedding == "fixed":', "if False:"),
    (f"{LAB}/parallel.py", "x.cpu().clone()", "x.cpu()"),
    (f"{LAB}/search.py", "if name in idle else ask", "if False else ask"),
    (f"{LAB}/search.py", "self.step_of(config), self", "self.step_of(self.config), self"),
    (f"{LAB}/__main__.py", "not options.named_objective and found", "not options.objective and found"),
    (SCRIPT, "!= (self.device.type in CHANNELS_LAST):", "is None:"),
    (f"{LAB}/parts.py", "if len(kinds) > 1:", "if len(kinds) > 2:"),
    (SCRIPT, '("grad_clip", "max_norm_embed"):', '("max_norm_embed",):'),
    (SCRIPT, "torch.cdist(u_hat, W)", "torch.cdist(z, W)"),
    (f"{LAB}/__main__.py", '("epochs", "patience") if saved', '("epochs",) if saved'),
    (f"{LAB}/__main__.py", 'del file["embed_dim"]', "pass"),
    (f"{LAB}/__main__.py", 'if "seed" in file and not saved and own', "if not saved and own"),
    (f"{LAB}/__main__.py", 'if "seed" in file and not saved and own', 'if "seed" in file and own'),
    (f"{LAB}/search.py", "replace(self.config, **settings).saved()", "self.config.saved() | settings"),
    (f"{LAB}/parts.py", 'mine["seconds"] += more["seconds"]', "pass"),
    (f"{LAB}/parts.py", '("classifier_loss", "seconds")', '("classifier_loss",)'),
    (f"{LAB}/data.py", "if parallel.rank_and_size()[0] == 0:", 'if os.environ.get("RANK", "0") == "0":'),
    (f"{LAB}/data.py", "if not config.classes:", "if False:"),
    (SCRIPT, '.get("loss", self.loss_name)) != self.loss_name:', '.get("loss", self.loss_name)) is None:'),
    (SCRIPT, '("train-images", config.train_images or 0), ', ""),
    (SCRIPT, "else (0, 10**9)", "else (0, sys.float_info.max)"),
    (SCRIPT, "(0, 2**64) if name", "(0, 10**9) if name"),
    (SCRIPT, "        images = torch.as_tensor(images)\n", ""),
    (SCRIPT, 'self.history if self.config.select == "validation" else []', "self.history"),
    (f"{LAB}/parts.py", "if len(paths) == 1 and not configs[0].blocks:", "if len(paths) == 1:"),
    (f"{LAB}/settings.py", "yield self.step_threads > 1024, fault", "yield False, fault"),
    (f"{LAB}/settings.py", "not 28 <= self.image_size <= 1024", "self.image_size < 28"),
    (f"{LAB}/search.py", '":memory:" in (url.database or ":memory:")', "False"),
    (f"{LAB}/parts.py", 'if not exchange and len({x["loss"]', 'if exchange and len({x["loss"]'),
    (f"{LAB}/search.py", '"tight" if alone else "constrained"', '"constrained"'),
    (f"{LAB}/pictures.py", '"L" if channels == 1 else "RGB"', '"RGB"'),
    (f"{LAB}/data.py", '" ".join(str(error).split())', "str(Failure(error))"),
    (SCRIPT, "decay *= vector.requires_grad", "decay *= 1"),
    (SCRIPT, "copy.deepcopy(content), content", "content, content"),
    (SCRIPT, 'Path(content["path"]).resolve() != options.checkpoint(state.config).resolve()', "False"),
    (
        f"{LAB}/search.py",
        "sorted(complete, key=lambda trial: trial.value)",
        "sorted(complete, key=lambda trial: -trial.value)",
    ),
    (f"{LAB}/data.py", "replace(config, batch_size=2) if config.all_images else config", "config"),
    (f"{LAB}/data.py", "inside = *above.pop(place), ", "inside = *(), "),
    (f"{LAB}/search.py", "self.short = replace(config, epochs=options.hpo_epochs)", "self.short = config"),
    (f"{LAB}/search.py", "if not options.hpo_final_run:", "if False:"),
    (
        f"{LAB}/__main__.py",
        "return model.probabilities(images)[:, -1]",
        "return model.probabilities(images)[:, 0]",
    ),
    (SCRIPT, "v.as_strided(x.shape, x.stride())", "v[: x.numel()].view(x.shape)"),
    (SCRIPT, '"chip": chip, ', '"chip": "", '),
    (SCRIPT, '"selected_epoch": state.selected_epoch', '"selected_epoch": len(state.history)'),
    (SCRIPT, "epoch {state.selected_epoch}, select", "epoch {len(state.history)}, select"),
    (SCRIPT, "label=label.format(y[-1])", "label=label.format(max(y))"),
    (SCRIPT, "at the end {chain[-1]:.2f}", "at the end {max(chain):.2f}"),
    (SCRIPT, "if answer == label[i] else", "if answer != label[i] else"),
    (
        SCRIPT,
        "        State.save(state, files[0]",
        "        picture(draw, files[3], model, data.test)\n        State.save(state, files[0]",
    ),
    (SCRIPT, "OSError, ImportError) as error:  # the last", "OSError) as error:  # the last"),
    (SCRIPT, "isinstance(error, OSError | ImportError)", "isinstance(error, OSError)"),
    (SCRIPT, "(isinstance(value, bool) or not least", "(not least"),
    (f"{LAB}/demo.py", 'server_name="127.0.0.1"', 'server_name="0.0.0.0"'),
    (f"{LAB}/demo.py", ", analytics_enabled=False", ""),
    (f"{LAB}/demo.py", '"GRADIO_ANALYTICS_ENABLED": "0", ', ""),
]

PARALLEL = [
    ("parallel: the gradient is not added up", "collective(dist.all_reduce, self.parts[name].grad)", "pass"),
    ("parallel: what others have trained is not gathered", "self.load_part_state(name, states)", "pass"),
]

BUGS = [
    Bug(name, file, old, new)
    for file, bugs in (
        (SCRIPT, SCHEDULE_AND_MODEL + OBJECTIVE + DATA + TRAINING + SELECTION + FILES_AND_SEARCH),
        (f"{LAB}/dt.py", DT),
        (f"{LAB}/early_exit.py", EARLY_EXIT),
        (f"{LAB}/backprop.py", BACKPROP),
        (f"{LAB}/parts.py", PARTS),
        (f"{LAB}/parallel.py", PARALLEL),
    )
    for name, old, new in bugs
] + [Bug(f"by reading: {old.strip()}", file, old, new) for file, old, new in FOUND_BY_READING]

LIKELY = {  # by the beginning of a bug's name: the test file that runs before all others
    "resume:": "reliability",
    "files are": "reliability",
    "an older": "reliability",
    "the last weights": "reliability",
    "digits": "command_line",
    "evaluate: validation": "command_line",
    "the search": "search",
    "merge:": "parts",
    "parallel:": "parallel",
}
