"""Single mistakes in the equations, each with the tests that are meant to catch it; `mutation_check.py` makes them."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """One line of the package, broken.

    Attributes:
        title: what is wrong then.
        file: below lora_gen_jax/.
        old, new: text of the file, which stands there once, and what takes its place.
        tests: files below tests/, or tests in them as pytest names them.
    """

    title: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


ROUTER, CLOUD, STEP = "generator/test_router.py", "generator/test_cloud.py", "training/test_step.py"
MERGE, MODEL = "adapters/test_merge.py", "decoder/test_model.py"

MUTANTS = (
    Mutant(
        "the K gates are not renormalized",
        "generator/router.py",
        "weight = weight / jnp.sum(weight, axis=-1, keepdims=True)",
        "weight = weight / 1.0",
        (f"{ROUTER}::test_training_gates_are_the_equations_with_the_batchs_statistics",),
    ),
    Mutant(
        "the softmax is over the layers",
        "generator/router.py",
        "keep_top_k(jax.nn.softmax(logits_BLE, axis=-1), top_k)",
        "keep_top_k(jax.nn.softmax(logits_BLE, axis=-2), top_k)",
        (f"{ROUTER}::test_training_gates_are_the_equations_with_the_batchs_statistics",),
    ),
    Mutant(
        "the importance is of the layers' experts, not summed over the batch alone",
        "generator/router.py",
        "importance_E = jnp.sum(gates_BLE, axis=(0, 1))",
        "importance_E = jnp.sum(gates_BLE, axis=(0, 2))",
        (f"{ROUTER}::test_cv_is_the_unbiased_variance_of_importance_over_its_squared_mean",),
    ),
    Mutant(
        "the variance of the importance is biased",
        "generator/router.py",
        "jnp.var(importance_E, ddof=1)",
        "jnp.var(importance_E, ddof=0)",
        (f"{ROUTER}::test_cv_is_the_unbiased_variance_of_importance_over_its_squared_mean",),
    ),
    Mutant(
        "Gumbel gates without the temperature",
        "generator/router.py",
        "jax.nn.softmax(logits_BLE / temperature, axis=-1)",
        "jax.nn.softmax(logits_BLE, axis=-1)",
        (f"{ROUTER}::test_gumbel_softmax_without_noise_divides_by_the_temperature",),
    ),
    Mutant(
        "Gumbel routing keeps all experts",
        "generator/router.py",
        'return Gates.of_all(soft_BLE) if routing == "gumbel" else keep_top_k(soft_BLE, top_k)',
        "return Gates.of_all(soft_BLE)",
        (f"{ROUTER}::test_gumbel_top_k_is_the_soft_gates_of_the_same_noise_with_the_k_largest_kept",),
    ),
    Mutant(
        "the running variance is biased",
        "generator/router.py",
        "rows / max(rows - lost, 1)",
        "rows / max(rows, 1)",
        (f"{ROUTER}::test_inference_after_batches_of_few_rows_is_torchs",),
    ),
    Mutant(
        "packed prompts see each other",
        "generator/cloud.py",
        "segments_BT=prompts.segments_BT,",
        "segments_BT=None,",
        (f"{CLOUD}::test_prompts_packed_into_rows_give_the_meta_tokens_of_each_alone",),
    ),
    Mutant(
        "meta embeddings without the model's scale",
        "generator/cloud.py",
        "(meta_LC * scale)[",
        "meta_LC[",
        (f"{CLOUD}::test_meta_embeddings_are_scaled_as_the_models_own_are",),
    ),
    Mutant(
        "the pool without α/r",
        "generator/lora_gen.py",
        "        scale=settings.alpha / settings.rank,\n",
        "        scale=1.0,\n",
        ("training/test_torch_peer.py::test_gates_and_loss_of_one_model_that_is_both",),
    ),
    Mutant(
        "a LoRA without its scale",
        "adapters/lora.py",
        "return h_BTR * jnp.asarray(self.scale, x_BTD.dtype), b",
        "return h_BTR, b",
        ("methods/test_multi_task_lora.py::test_merged_equals_the_side_path_and_changes_the_model",),
    ),
    Mutant(
        "the gradient of a product has the wrong sign",
        "decoder/product.py",
        "of_x = jnp.matmul(rounded, right.swapaxes(-1, -2),",
        "of_x = jnp.matmul(-rounded, right.swapaxes(-1, -2),",
        (f"{STEP}::test_gradients_are_slopes[shared]",),
    ),
    Mutant(
        "dropout does not scale up what it keeps",
        "adapters/lora.py",
        "kept_x = x * jnp.asarray(1 / (1 - rate), x.dtype)",
        "kept_x = x",
        (f"{MERGE}::test_dropout_zeroes_its_share_and_scales_up_the_rest",),
    ),
    Mutant(
        "rows are dealt to the prompts in turn",
        "adapters/lora.py",
        "return x_BTD.reshape(prompts, -1, x_BTD.shape[-1])",
        "return x_BTD.reshape(-1, prompts, *x_BTD.shape[1:]).swapaxes(0, 1).reshape(prompts, -1, x_BTD.shape[-1])",
        (f"{MERGE}::test_the_merged_model_says_what_the_side_path_says[shared products K=2 llama]",),
    ),
    Mutant(
        "the chosen experts are not weighed",
        "adapters/gated_pool.py",
        "columns(weight_PK * self.scale, R, x_PSD.dtype)",
        "columns(jnp.ones_like(weight_PK) * self.scale, R, x_PSD.dtype)",
        (f"{MERGE}::test_the_merged_model_says_what_the_side_path_says[shared products K=2 llama]",),
    ),
    Mutant(
        "merging mixes the products of other experts",
        "adapters/gated_pool.py",
        "gates.chosen(a), gates.chosen(b), self.scale)",
        "gates.chosen(a), gates.chosen(b)[::-1], self.scale)",
        (f"{MERGE}::test_merging_adds_the_equations_delta_to_the_sites_of_the_method_alone",),
    ),
    Mutant(
        "merging gives the base's memory away",
        "adapters/merge.py",
        "_keeping = jax.jit(_sum)",
        "_keeping = jax.jit(_sum, donate_argnums=0)",
        (f"{MERGE}::test_the_base_stays_as_it_was_and_subtraction_returns_to_it_within_rounding",),
    ),
    Mutant(
        "the next specialization is added to the last",
        "adapters/merge.py",
        "read = written if targets is None else kernels",
        "read = written",
        (f"{MERGE}::test_a_merged_model_is_written_over_by_the_next",),
    ),
    Mutant(
        "taking an adapter out adds it again",
        "adapters/merge.py",
        "return _merged(_keeping, params, adapter, -1.0)",
        "return _merged(_keeping, params, adapter, 1.0)",
        (f"{MERGE}::test_the_base_stays_as_it_was_and_subtraction_returns_to_it_within_rounding",),
    ),
    Mutant(
        "a token does not see itself",
        "decoder/attention.py",
        "mask = (key_BS[:, None, :] <= query_BT[:, :, None])",
        "mask = (key_BS[:, None, :] < query_BT[:, :, None])",
        (f"{MODEL}::test_attention_is_a_plain_loop_over_visible_keys",),
    ),
    Mutant(
        "padding is seen",
        "decoder/attention.py",
        " & (key_BS[:, None, :] >= 0)",
        "",
        (f"{MODEL}::test_logits_are_those_of_transformers_at_every_real_position[llama-left]",),
    ),
    Mutant(
        "the window is one too wide",
        "decoder/attention.py",
        "query_BT[:, :, None] - key_BS[:, None, :] < window",
        "query_BT[:, :, None] - key_BS[:, None, :] <= window",
        (f"{MODEL}::test_attention_is_a_plain_loop_over_visible_keys",),
    ),
    Mutant(
        "rotary positions turn the other way",
        "decoder/layers.py",
        "[first * cos - second * sin, second * cos + first * sin]",
        "[first * cos + second * sin, second * cos - first * sin]",
        (f"{MODEL}::test_logits_are_those_of_transformers_at_every_real_position[llama-right]",),
    ),
    Mutant(
        "norms without Gemma's offset",
        "decoder/layers.py",
        "x * (c.norm_offset + scale.astype(float))",
        "x * (scale.astype(float))",
        (f"{MODEL}::test_logits_are_those_of_transformers_at_every_real_position[gemma-right]",),
    ),
    Mutant(
        "queries stand at the positions of the soft tokens",
        "training/step.py",
        "positions_PT + before)",
        "positions_PT)",
        ("methods/test_autocompressor.py::test_the_objective_and_its_gradient_within_substeps",),
    ),
    Mutant(
        "soft tokens have the position embedding of a first token",
        "decoder/model.py",
        "jnp.where(learned_BT[:, :, None] >= 0, placed_BTD,",
        "jnp.where(learned_BT[:, :, None] >= -1, placed_BTD,",
        ("methods/test_autocompressor.py::test_learned_positions_are_those_of_a_segments_own_tokens_in_training_too",),
    ),
    Mutant(
        "every slot is supervised",
        "training/step.py",
        "hidden_PSD, batch.target_PS, batch.weight_PS)",
        "hidden_PSD, batch.target_PS, jnp.ones_like(batch.weight_PS))",
        (f"{STEP}::test_padding_and_unused_slots_change_nothing",),
    ),
    Mutant(
        "the balance loss is subtracted",
        "training/step.py",
        "return loss + more,",
        "return loss - more,",
        (f"{STEP}::test_the_objective_adds_the_weighted_balance_loss",),
    ),
    Mutant(
        "a training step gives the frozen weights' memory away",
        "training/step.py",
        "jax.jit(step_fn, donate_argnums=0)",
        "jax.jit(step_fn, donate_argnums=(0, 1))",
        (f"{STEP}::test_a_step_updates_state_and_statistics_and_no_frozen_weight",),
    ),
    Mutant(
        "dropout is the same in every step",
        "training/step.py",
        "jax.random.fold_in(jax.random.key(config.train.seed), state.step)",
        "jax.random.key(config.train.seed)",
        (f"{STEP}::test_every_step_draws_its_own_dropout",),
    ),
    Mutant(
        "inner steps climb",
        "training/inner.py",
        "values_PLE - train.inner_rate * softened_sign",
        "values_PLE + train.inner_rate * softened_sign",
        ("training/test_inner.py::test_steps_lower_the_loss_on_the_shots_and_spare_prompts_without",),
    ),
    Mutant(
        "the router learns nothing where there are inner steps",
        "training/inner.py",
        "logits_PLE = jnp.where(swapped_P11, start_PLE, logits_PLE) + (end_PLE - start_PLE)",
        "logits_PLE = end_PLE",
        ("training/test_inner.py::test_the_pool_learns_at_the_refined_gates_and_the_router_from_its_own_prompts",),
    ),
)
