"""Kernels that run a whole diffusion reverse sampler, forward and backward, as one operation."""

from gdpd_kernels.backends import BackendError, BackendFallback, backends
from gdpd_kernels.capture import CapturedDenoiser, CaptureError, capture
from gdpd_kernels.functional import denoise, prior_loss, reverse_sample
from gdpd_kernels.lstm import lstm
from gdpd_kernels.philox import philox_normal, philox_words
from gdpd_kernels.program import DenoiserProgram, ProgramError
from gdpd_kernels.schedule import DDIMTable, alphas_cumprod, ddim_table, make_betas

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BackendFallback",
    "CaptureError",
    "CapturedDenoiser",
    "DDIMTable",
    "DenoiserProgram",
    "ProgramError",
    "alphas_cumprod",
    "backends",
    "capture",
    "ddim_table",
    "denoise",
    "lstm",
    "make_betas",
    "philox_normal",
    "philox_words",
    "prior_loss",
    "reverse_sample",
]
