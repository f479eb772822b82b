"""The mathematics of diffusion: tensors in, tensors out.

No modules, no files, no clock, no global random numbers. Two scales appear:

* *VP* (variance preserving), what networks see: ``x = sqrt(abar) x0 + sqrt(1 - abar) eps``;
* *sigma space*, what k-diffusion calls x: ``y = x / sqrt(abar) = x0 + sigma eps`` with
  ``sigma = sqrt((1 - abar) / abar)``.

``abar`` (ā) is ``alphas_cumprod`` elsewhere. Every public function of this package takes and
gives VP latents; solvers that work in sigma space convert inside.
"""
