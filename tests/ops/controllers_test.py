"""The KL coefficient's rule in literal numbers, and averages of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.controllers import adapted_kl_coef, moved

HORIZON, ROLLOUTS = 10_000, 256


@pytest.mark.parametrize(
    ("kl", "error"),
    [(12.0, 0.2), (6.0, 0.0), (7.2, 0.2), (6.6, 0.1), (5.4, -0.1), (3.0, -0.2), (-1.0, -0.2)],
)
def test_beta_grows_above_the_target_and_shrinks_below(kl, error):
    found = adapted_kl_coef(0.1, kl, target=6.0, horizon=HORIZON, rollouts=ROLLOUTS)
    assert float(found) == pytest.approx(0.1 * (1 + error * ROLLOUTS / HORIZON), rel=1e-6)


def test_what_is_no_number_and_what_is_too_much():
    for kl in (np.nan, np.inf, -np.inf):
        found = adapted_kl_coef(0.1, kl, target=6.0, horizon=HORIZON, rollouts=ROLLOUTS)
        assert found == np.float32(0.1)
    beta = jnp.float32(0.9)
    for _ in range(10):
        beta = adapted_kl_coef(beta, 99.0, target=6.0, horizon=10, rollouts=10, most=0.99)
    assert beta == np.float32(0.99)


def test_a_moving_reference_is_a_mean_in_float32_and_a_reset_a_copy():
    old, new = jnp.array([1.0, -2.0, 0.5]), jnp.array([2.0, 2.0, 0.1])
    np.testing.assert_allclose(moved(old, new, 0.75), [1.25, -1.0, 0.4], rtol=1e-6)
    # What a sum 0 * old + 1 * new would not give: what is not a number in the old one is gone.
    spoilt = old.at[0].set(jnp.nan)
    reset = jax.jit(lambda r, p: moved(r, p, 0.0))(spoilt, new)
    np.testing.assert_array_equal(reset, new)
    assert reset.unsafe_buffer_pointer() != new.unsafe_buffer_pointer()
    assert moved(old.astype(jnp.bfloat16), new, 0.5).dtype == jnp.bfloat16
