"""Measuring pictures: the judge, the cross-check, Fréchet distance, probes, scores.

    from safelight.evaluate import prompts, score
    table = score.score(generate, prompts.load("held_out"), judge)

`prompts` are the fixed lists, `judge` the learned reader of pictures, `segment` the reader that is
not learned, `frechet` the distance between sets, `probe` what an embedding holds, and `score` puts
them together. `features` names what other `metrics` are measured in, `sets` measures any two sets
of pictures, `pareto` sweeps guidance as the cards do, `variation` tells what variations keep,
`memorisation` what was copied, `limits` draws biases. No part of training, of checkpoint or
guidance choice, or of re- ranking reads the test lists.
"""
