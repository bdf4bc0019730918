"""Single faults, seeded: with any one of them a test must fail. `make mutants` tries them all.

Each is one change of text, `old` to `new`, that breaks what the paper, the reference or a docstring says; none only
moves a value within rounding, and none merely raises. Whoever changes a line that stands here changes it here too:
tests/unit/test_mutants.py fails where `old` no longer occurs exactly once.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One fault."""

    file: str
    wrong: str  # what is wrong with it
    old: str  # occurs exactly once in the file
    new: str
    tests: str  # what should kill it: test files, or node ids of slow ones, with a space between


REFERENCE = (
    # --- the objective and its gradient
    Mutant(
        "reference/losses.py",
        "Huber's δ on the wrong side: linear near 0, quadratic far away",
        "np.where(size <= delta,",
        "np.where(size >= delta,",
        "tests/reference/test_losses.py",
    ),
    Mutant(
        "reference/losses.py",
        "the mean over candidates for their sum",
        "weights * value.sum(axis=-1)",
        "weights * value.mean(axis=-1)",
        "tests/reference/test_losses.py",
    ),
    Mutant(
        "reference/losses.py",
        "a query of one position loses what the others would have had",
        "np.where(supervised[:, 0] > 1, first_share, 1)",
        "first_share",
        "tests/reference/test_losses.py",
    ),
    Mutant(
        "reference/losses.py",
        "the candidates' mask forgotten",
        "mask = targets.candidate_mask & targets.position_mask[..., None]",
        "mask = np.ones_like(targets.candidate_mask) & targets.position_mask[..., None]",
        "tests/reference/test_losses.py",
    ),
    Mutant(
        "reference/losses.py",
        "centring divides by all candidates, masked ones too",
        "count = np.maximum(mask.sum(axis=-1, keepdims=True), 1)",
        "count = mask.shape[-1]",
        "tests/reference/test_losses.py",
    ),
    Mutant(
        "reference/losses.py",
        "centring left out of the gradient",
        "slope = without_mean(slope, mask)",
        "slope = np.where(mask, slope, 0.0)",
        "tests/reference/test_losses.py",
    ),
    # --- what the teacher gives
    Mutant(
        "reference/teacher.py",
        "the tie rule reversed: of equal logits the higher id",
        'np.argsort(-logits, axis=-1, kind="stable")[..., :k]',
        'np.argsort(logits, axis=-1, kind="stable")[..., ::-1][..., :k]',
        "tests/reference/test_reference_teacher.py",
    ),
    Mutant(
        "reference/teacher.py",
        "the base's new candidates in the order of its logits, not sorted",
        "new = sorted(set(base_ids[place].tolist()) - set(ids[place].tolist()))",
        "new = [i for i in base_ids[place].tolist() if i not in ids[place].tolist()]",
        "tests/reference/test_reference_teacher.py",
    ),
    Mutant(
        "reference/teacher.py",
        "the end of turn is not supervised",
        "supervised = np.array([len(words) + 1 for words in continuations])",
        "supervised = np.array([max(1, len(words)) for words in continuations])",
        "tests/reference/test_reference_teacher.py tests/reference/test_duet.py",
    ),
    Mutant(
        "reference/teacher.py",
        "the stop token stays in the continuation",
        "        if int(ids[0]) in stop:\n            break\n        words.append(int(ids[0]))\n",
        "        words.append(int(ids[0]))\n        if int(ids[0]) in stop:\n            break\n",
        "tests/reference/test_reference_teacher.py",
    ),
    Mutant(
        "reference/teacher.py",
        "retain queries read the forget context though they should have none",
        'if retain_context == "none":\n        return None',
        'if retain_context == "none":\n        return contexts[0]',
        "tests/reference/test_reference_teacher.py",
    ),
    Mutant(
        "reference/duet.py",
        "softmax before top-K: probabilities for raw logits",
        "return np.take_along_axis(logits, positions[..., None], axis=1)",
        "return np.take_along_axis(transformer.parts.softmax(logits)[0], positions[..., None], axis=1)",
        "tests/reference/test_duet.py",
    ),
    Mutant(
        "reference/duet.py",
        "the teacher carries the student's adapter",
        "base = student._replace(adapters={})",
        "base = student",
        "tests/reference/test_duet.py",
    ),
    Mutant(
        "reference/duet.py",
        "gradients of masked places overwrite those that they repeat",
        "np.add.at(by_logits, places, by_candidates)",
        "by_logits[places] = by_candidates",
        "tests/reference/test_duet.py",
    ),
    # --- tokens and positions
    Mutant(
        "reference/context.py",
        "supervised positions off by one: the token after the next",
        "start = np.array([len(prompt) - 1 for prompt in prompts])",
        "start = np.array([len(prompt) for prompt in prompts])",
        "tests/reference/test_reference_context.py",
    ),
    Mutant(
        "reference/context.py",
        "a second BOS behind the context",
        "[bos, *context[context[:1] == [bos] :], *query[1:]]",
        "[bos, *context[context[:1] == [bos] :], *query]",
        "tests/reference/test_reference_context.py",
    ),
    # --- the optimizer and LoRA
    Mutant(
        "reference/adam.py",
        "no bias correction, as MLX's default has it",
        "mean, square = first[name] / (1 - beta1**t), second[name] / (1 - beta2**t)",
        "mean, square = first[name], second[name]",
        "tests/reference/test_adam.py",
    ),
    Mutant(
        "reference/adam.py",
        "ε inside the root",
        "(np.sqrt(square) + epsilon)",
        "np.sqrt(square + epsilon)",
        "tests/reference/test_adam.py",
    ),
    Mutant(
        "reference/lora.py",
        "the scale applied twice",
        "y + lora.scale * (x @ lora.a) @ lora.b",
        "y + lora.scale**2 * (x @ lora.a) @ lora.b",
        "tests/reference/test_lora.py",
    ),
    Mutant(
        "reference/lora.py",
        "no gradient through LoRA to the layer's input",
        "return by_x + (by_hidden @ lora.a.T).reshape(x.shape), by_a, by_b",
        "return by_x, by_a, by_b",
        "tests/reference/test_lora.py",
    ),
    # --- the model
    Mutant(
        "reference/quantize.py",
        "the quantization's bias dropped",
        "groups * scales[..., None] + biases[..., None]",
        "groups * scales[..., None]",
        "tests/reference/test_quantize.py",
    ),
    Mutant(
        "reference/parts.py",
        "RoPE starts at 0 behind a prefix",
        "positions = np.arange(start, start + x.shape[-2])",
        "positions = np.arange(x.shape[-2])",
        "tests/reference/test_parts.py tests/reference/test_transformer.py",
    ),
    Mutant(
        "reference/parts.py",
        "attention sees one token ahead",
        "np.arange(k.shape[2]) <= past + np.arange(queries.shape[2])[:, None]",
        "np.arange(k.shape[2]) <= past + 1 + np.arange(queries.shape[2])[:, None]",
        "tests/reference/test_parts.py tests/reference/test_transformer.py",
    ),
    Mutant(
        "reference/parts.py",
        "gradients of shared key heads averaged, not added",
        "*keys.shape[2:]).sum(axis=2)",
        "*keys.shape[2:]).mean(axis=2)",
        "tests/reference/test_parts.py tests/reference/test_transformer.py",
    ),
    Mutant(
        "reference/parts.py",
        "GELU's slope without that of its tanh",
        "0.5 * (1 + t) + 0.5 * z * (1 - t**2) * c * (1 + 3 * 0.044715 * z**2)",
        "0.5 * (1 + t)",
        "tests/reference/test_parts.py",
    ),
    Mutant(
        "reference/transformer.py",
        "the scale of what the MLP adds forgotten on the way back",
        "after_back(scale * by_y)",
        "after_back(by_y)",
        "tests/reference/test_transformer.py",
    ),
    Mutant(
        "reference/transformer.py",
        "a loss on hidden states reads them a layer too high",
        "while len(blocks) != count and",
        "while len(blocks) != (None if count is None else count + 1) and",
        "tests/reference/test_transformer.py",
    ),
    # --- metrics and baselines
    Mutant(
        "reference/metrics.py",
        "recall and precision swapped",
        "recall, precision = length / len(target), length / len(answer)",
        "precision, recall = length / len(target), length / len(answer)",
        "tests/reference/test_metrics.py",
    ),
    Mutant(
        "reference/metrics.py",
        "the bootstrap interval holds 90 %, not 95 %",
        "(0.025, 0.975)",
        "(0.05, 0.95)",
        "tests/reference/test_metrics.py",
    ),
    Mutant(
        "reference/baselines.py",
        "UNDIAL raises the answer token's logit",
        "reference_logits - beta * one_hot",
        "reference_logits + beta * one_hot",
        "tests/reference/test_baselines.py",
    ),
    Mutant(
        "reference/baselines.py",
        "KL in the reverse direction",
        "crossed, gradient = cross_entropy(logits, reference_logits, mask)",
        "crossed, gradient = cross_entropy(reference_logits, logits, mask)",
        "tests/reference/test_baselines.py",
    ),
)

BACKEND = (
    # --- the objective
    Mutant(
        "duet_mlx/losses.py",
        "Huber's δ on the wrong side",
        "quadratic = mx.minimum(size, delta)",
        "quadratic = mx.maximum(size, delta)",
        "tests/equivalence/test_losses_equivalence.py",
    ),
    Mutant(
        "duet_mlx/losses.py",
        "the mean over candidates for their sum",
        "huber.sum(axis=-1)",
        "huber.mean(axis=-1)",
        "tests/equivalence/test_losses_equivalence.py",
    ),
    Mutant(
        "duet_mlx/losses.py",
        "each other position has the first one's share",
        "(1 - first_share) * mask[:, 1:]",
        "first_share * mask[:, 1:]",
        "tests/equivalence/test_losses_equivalence.py",
    ),
    Mutant(
        "duet_mlx/losses.py",
        "the positions' mask forgotten",
        "mask = targets.candidate_mask & targets.position_mask[..., None]",
        "mask = targets.candidate_mask",
        "tests/equivalence/test_losses_equivalence.py",
    ),
    Mutant(
        "duet_mlx/losses.py",
        "centring divides by all candidates, masked ones too",
        "count = mx.maximum(mask.sum(axis=-1, keepdims=True), 1)",
        "count = mask.shape[-1]",
        "tests/equivalence/test_losses_equivalence.py",
    ),
    Mutant(
        "duet_mlx/losses.py",
        "gradients reach the targets",
        "target_logits = mx.stop_gradient(targets.logits)",
        "target_logits = targets.logits",
        "tests/equivalence/test_losses_equivalence.py",
    ),
    # --- what the teacher gives
    Mutant(
        "duet_mlx/teacher.py",
        "the tie rule reversed: of equal logits the higher id",
        "level[: k - len(above)]",
        "level[len(level) - (k - len(above)) :]",
        "tests/equivalence/test_teacher_equivalence.py",
    ),
    Mutant(
        "duet_mlx/teacher.py",
        "the base's new candidates in the order of its logits, not sorted",
        "new = np.setdiff1d(base_ids[place], teacher_ids[place])",
        "new = base_ids[place][~np.isin(base_ids[place], teacher_ids[place])]",
        "tests/equivalence/test_teacher_equivalence.py",
    ),
    Mutant(
        "duet_mlx/teacher.py",
        "softmax before top-K: probabilities for raw logits",
        "= topk(values, k)",
        "= topk(np.exp(np.array(values)) / np.exp(np.array(values)).sum(axis=-1, keepdims=True), k)",
        "tests/equivalence/test_teacher_equivalence.py::test_targets_of_a_model_are_the_references",
    ),
    Mutant(
        "duet_mlx/teacher.py",
        "retain queries read the forget context though they should have none",
        'if retain_context == "none":\n            return None',
        'if retain_context == "none":\n            return contexts[0]',
        "tests/unit/test_teacher.py",
    ),
    Mutant(
        "duet_mlx/teacher.py",
        "the end of turn is not supervised",
        "position_mask[row, : len(answer) + 1] = True",
        "position_mask[row, : max(1, len(answer))] = True",
        "tests/equivalence/test_teacher_equivalence.py::test_targets_of_a_model_are_the_references",
    ),
    Mutant(
        "duet_mlx/teacher.py",
        "union: the base reads the context as well",
        "plain = [render(tokenizer, queries[i].question) for i in where]",
        "plain = [render(tokenizer, queries[i].question, context) for i in where]",
        "tests/equivalence/test_teacher_equivalence.py::test_targets_of_a_model_are_the_references",
    ),
    Mutant(
        "duet_mlx/kept_targets.py",
        "targets of another K are used again",
        '("top_k", "candidates", "positions", "retain_context")',
        '("candidates", "positions", "retain_context")',
        "tests/unit/test_kept_targets.py",
    ),
    # --- tokens, positions, batches
    Mutant(
        "duet_mlx/stream.py",
        "supervised positions off by one: the token after the next",
        "start = np.array([len(self.suffixes[row]) - 1 for row in rows])",
        "start = np.array([len(self.suffixes[row]) for row in rows])",
        "tests/equivalence/test_stream_equivalence.py",
    ),
    Mutant(
        "duet_mlx/stream.py",
        "the seed ignored in the schedule",
        "random = np.random.default_rng(settings.seed)",
        "random = np.random.default_rng(0)",
        "tests/equivalence/test_stream_equivalence.py",
    ),
    Mutant(
        "duet_mlx/stream.py",
        "shares of forget and retain queries swapped",
        "zip(draws, (f, r), strict=True)",
        "zip(draws, (r, f), strict=True)",
        "tests/equivalence/test_stream_equivalence.py",
    ),
    Mutant(
        "duet_mlx/generate.py",
        "the prefix counted twice in positions",
        "entry.offset = keys.shape[2]",
        "entry.offset = 2 * keys.shape[2]",
        "tests/unit/test_generate.py",
    ),
    Mutant(
        "duet_mlx/generate.py",
        "a row's padding visible while it is decoded",
        "self.visible = mx.arange(self.keys.shape[2])[None] < self.offset[:, None]",
        "self.visible = mx.ones((len(self.offset), self.keys.shape[2]), dtype=mx.bool_)",
        "tests/unit/test_generate.py",
    ),
    Mutant(
        "duet_mlx/generate.py",
        "the stop token is a word of the answer, which goes on behind it",
        "if not ended[row] and token not in stop:",
        "if not ended[row]:",
        "tests/unit/test_generate.py",
    ),
    Mutant(
        "duet_mlx/data.py",
        "a retained question that differs in case from a forgotten one passes for another",
        'unicodedata.normalize("NFKC", question).casefold()',
        'unicodedata.normalize("NFKC", question)',
        "tests/unit/test_data.py",
    ),
    Mutant(
        "duet_mlx/context.py",
        "a question that becomes other tokens behind the context passes",
        "if ids == bare or _equal_tail(tokenizer, bare, ids, question + frame.tail):",
        "if ids:",
        "tests/unit/test_render.py",
    ),
    # --- the model
    Mutant(
        "duet_mlx/head.py",
        "the quantization's bias dropped in the gathered head",
        "None if biases is None else biases[ids]",
        "None if biases is None else mx.zeros_like(biases[ids])",
        "tests/unit/test_head.py",
    ),
    Mutant(
        "duet_mlx/head.py",
        "hidden states and head rows meet in the model's own half precision",
        "hidden = hidden.astype(mx.float32)",
        "hidden = hidden + 0",
        "tests/equivalence/test_head_equivalence.py",
    ),
    Mutant(
        "duet_mlx/model.py",
        "LoRA's scale applied twice",
        '"scale": scale,',
        '"scale": scale * scale,',
        "tests/unit/test_model.py",
    ),
    Mutant(
        "duet_mlx/lower.py",
        "the layers above are entered one layer late",
        "with _standing_in(model, slice(layer, None), layer,",
        "with _standing_in(model, slice(layer + 1, None), layer + 1,",
        "tests/equivalence/test_invariants.py::test_layers_run_once_give_the_loss_and_gradient_of_layers_run_each_time",
    ),
    Mutant(
        "duet_mlx/lower.py",
        "the layers below are run without the prefix",
        "branch(cache, len(rows)) or None)",
        "None)",
        "tests/equivalence/test_invariants.py::test_layers_run_once_give_the_loss_and_gradient_of_layers_run_each_time",
    ),
    # --- training
    Mutant(
        "duet_mlx/loop.py",
        "Adam's bias correction left at MLX's default",
        "eps=1e-8, bias_correction=True)",
        "eps=1e-8)",
        "tests/equivalence/test_lora_adam_equivalence.py",
    ),
    Mutant(
        "duet_mlx/loop.py",
        "accumulated gradients added, not averaged",
        "gradient = tree_map(lambda g: g / of, gradient)",
        "gradient = tree_map(lambda g: g, gradient)",
        "tests/equivalence/test_invariants.py::test_accumulated_steps_are_one_step_of_the_mean_gradient",
    ),
    Mutant(
        "duet_mlx/loop.py",
        "the steps of an accumulation that are left at the end make no update",
        "waiting == settings.grad_accumulation_steps or it == last",
        "waiting == settings.grad_accumulation_steps",
        "tests/cli/test_resume.py::test_the_last_update_takes_the_steps_that_are_left",
    ),
    Mutant(
        "duet_mlx/resume.py",
        "an adapter goes on with the optimizer of another step",
        "if arrays_hash(weights) != adapter:",
        "if False:",
        "tests/cli/test_resume.py::test_a_numbered_copy_is_refused_with_the_name_of_what_can_be_gone_on_from",
    ),
    Mutant(
        "duet_mlx/resume.py",
        "resuming repeats the last step",
        "return State(step, weights",
        "return State(step - 1, weights",
        "tests/cli/test_runs.py::test_ctrl_c_waits_for_the_end_of_an_update",
    ),
    # --- evaluation
    Mutant(
        "duet_mlx/metrics.py",
        "recall and precision swapped",
        "return length / len(target), 2 * length / (len(target) + len(answer))",
        "return length / max(1, len(answer)), 2 * length / (len(target) + len(answer))",
        "tests/unit/test_metrics.py",
    ),
    Mutant(
        "duet_mlx/metrics.py",
        "the bootstrap interval holds 90 %, not 95 %",
        "[2.5, 97.5]",
        "[5, 95]",
        "tests/unit/test_metrics.py",
    ),
    Mutant(
        "duet_mlx/metrics.py",
        "the chance floor counts an answer's own question",
        "for j, target in enumerate(targets) if j != i]",
        "for target in targets]",
        "tests/unit/test_metrics.py",
    ),
    Mutant(
        "duet_mlx/scores.py",
        "a refusal counted where the base refuses too",
        "None if metrics.is_refusal(base.answers[i]) else refused",
        "refused",
        "tests/unit/test_evaluate.py::test_a_refusal_counts_only_where_the_base_does_not_refuse_the_same_words",
    ),
    Mutant(
        "duet_mlx/scores.py",
        "behind a reverse prompt, the target is the base's answer to that prompt",
        "base_words[plain[a.query.id] if a.prefix else i]",
        "base_words[i]",
        "tests/unit/test_evaluate.py::test_behind_a_reverse_prompt_the_target_is_the_answer_to_the_plain_question",
    ),
    Mutant(
        "duet_mlx/answers.py",
        "an answer given behind the context is judged behind it",
        "[judged[i] for i in others]",
        "[prompts[i] for i in others]",
        "tests/unit/test_evaluate.py::test_the_perplexity_of_every_answer_is_the_bases_behind_the_question_alone",
    ),
    Mutant(
        "duet_mlx/answers.py",
        "a word's probability is its tokens' mean, not their product",
        "values[list(word)].prod()",
        "values[list(word)].mean()",
        "tests/unit/test_evaluate.py::test_the_mean_over_words_is_of_their_tokens_products",
    ),
    # --- the baselines' losses
    Mutant(
        "duet_mlx/baselines.py",
        "NPO on the mean log-likelihood, as SimNPO has it",
        "softplus(-beta * (answer_nll(answers) - reference_nll))",
        "softplus(-beta * (mean_nll(answers) - reference_nll))",
        "tests/equivalence/test_methods_equivalence.py",
    ),
    Mutant(
        "duet_mlx/baselines.py",
        "the log-likelihood is of raw logits",
        "    return shifted - mx.logsumexp(shifted, axis=-1, keepdims=True)",
        "    return shifted",
        "tests/equivalence/test_methods_equivalence.py",
    ),
    Mutant(
        "duet_mlx/baselines.py",
        "FLAT's mean probability counts padding, each position as 1",
        "probs = mx.where(answers.mask, mx.exp(token_log_probs(answers)), 0)",
        "probs = mx.exp(token_log_probs(answers))",
        "tests/equivalence/test_methods_equivalence.py",
    ),
    Mutant(
        "duet_mlx/baselines.py",
        "a mean over all positions, prompt and padding included",
        "return mx.maximum(mask.sum(axis=-1), 1)",
        "return mx.maximum(mx.ones_like(mask).sum(axis=-1), 1)",
        "tests/equivalence/test_methods_equivalence.py",
    ),
    Mutant(
        "duet_mlx/baselines.py",
        "UNDIAL lifts the answer's logit instead of lowering it",
        "reference_logits - beta, reference_logits)",
        "reference_logits + beta, reference_logits)",
        "tests/equivalence/test_methods_equivalence.py",
    ),
    Mutant(
        "duet_mlx/methods.py",
        "the weights of forget and retain loss swapped",
        "total = total + gamma * method.loss(",
        "total = total + alpha * method.loss(",
        "tests/equivalence/test_method_runs.py::test_a_free_run_in_float64_is_the_references",
    ),
    Mutant(
        "duet_mlx/methods.py",
        "the frozen base's log-likelihood for its negative",
        "return -self.batch.logits[..., 0].sum(axis=-1)",
        "return self.batch.logits[..., 0].sum(axis=-1)",
        "tests/equivalence/test_method_invariants.py",
    ),
    Mutant(
        "duet_mlx/methods.py",
        "RMU reads what comes into its layer, not what comes out of it",
        "inside = layer - (lower.layer if lower else 0)",
        "inside = layer - 1 - (lower.layer if lower else 0)",
        "tests/equivalence/test_method_invariants.py",
    ),
    Mutant(
        "duet_mlx/stream.py",
        "a refusal beside the answer to another question",
        "self.refusals[row] for row in rows[:count]]",
        "self.refusals[row] for row in rows[:count][::-1]]",
        "tests/equivalence/test_method_invariants.py",
    ),
    Mutant(
        "duet_mlx/labels.py",
        "the base's answer without its end of turn",
        "every[: len(tokens) + 1]",
        "every[: max(1, len(tokens))]",
        "tests/equivalence/test_method_runs.py::test_a_free_run_in_float64_is_the_references",
    ),
    # --- the comparison
    Mutant(
        "duet_mlx/compare_table.py",
        "a gain of forget recall counts as forgetting",
        '((FORGET, "recall", -1), ',
        '((FORGET, "recall", 1), ',
        "tests/unit/test_compare_table.py",
    ),
    Mutant(
        "duet_mlx/compare_table.py",
        "the Pareto front overlooks the worst reverse prompt",
        "points[model] = 1 - max(gone),",
        "points[model] = 1 - gone[0],",
        "tests/unit/test_compare_table.py",
    ),
    Mutant(
        "duet_mlx/compare.py",
        "the worst trial on validation is reported",
        "best = max(shifts,",
        "best = min(shifts,",
        "tests/cli/test_compare.py::test_the_best_on_validation_is_chosen_and_of_equals_the_first",
    ),
    # --- the benchmarks' metrics, and how their questions are asked
    Mutant(
        "duet_mlx/benchmark_metrics.py",
        "the arithmetic mean of the false answers' probabilities, as TOFU's text has it",
        "np.mean([np.mean(log_probs) for log_probs in perturbed]) - np.mean(paraphrased)",
        "np.log(np.mean([np.exp(np.mean(log_probs)) for log_probs in perturbed])) - np.mean(paraphrased)",
        "tests/unit/test_benchmark_metrics.py tests/equivalence/test_metrics_equivalence.py",
    ),
    Mutant(
        "duet_mlx/benchmark_metrics.py",
        "a tie counts whole in the AUC",
        '("left", "right")',
        '("right", "right")',
        "tests/equivalence/test_metrics_equivalence.py",
    ),
    Mutant(
        "duet_mlx/benchmark_metrics.py",
        "one-sided KS test",
        "np.abs(i * b - (d - i) * a) >= distance",
        "i * b - (d - i) * a >= distance",
        "tests/unit/test_benchmark_metrics.py tests/equivalence/test_metrics_equivalence.py",
    ),
    Mutant(
        "duet_mlx/benchmark_metrics.py",
        "KnowMem counts what the model asks itself",
        "|\\nQuestion|Question:",
        "|\\nAnswer",
        "tests/unit/test_benchmark_metrics.py tests/equivalence/test_metrics_equivalence.py",
    ),
    Mutant(
        "duet_mlx/probe.py",
        "the end of turn left out of the probability of an answer",
        "add_special_tokens=False), *end_of_turn(tokenizer)]",
        "add_special_tokens=False)]",
        "tests/unit/test_probe.py",
    ),
    Mutant(
        "duet_mlx/probe.py",
        "letters of options that the question does not have",
        "values[letters[: len(items[i].choices)]]",
        "values[letters]",
        "tests/unit/test_probe.py",
    ),
    Mutant(
        "duet_mlx/fluency.py",
        "the unlearned model judges its own fluency",
        "layer.scale = 0.0",
        "layer.scale *= 1.0",
        "tests/unit/test_probe.py",
    ),
    Mutant(
        "duet_mlx/items.py",
        "an option's text for its letter where both are letters",
        "by_mark or by_text if lettered",
        "by_text or by_mark if lettered",
        "tests/unit/test_benchmarks.py",
    ),
)

MUTANTS = (*REFERENCE, *BACKEND)
