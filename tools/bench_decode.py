"Time and peak memory of one decode path, in a process of its own; prints one JSON line.  bench_decode.py tiled|naive sparse|dense float32|bfloat16"
import json, resource, statistics, sys, time

import torch
from lexical_sae.decode import naive_decode, pooled_decode

B, L, D, V, OPEN, REPEATS = 32, 128, 384, 30522, 40, 5

def main(path, gradient, dtype):
    torch.manual_seed(0)
    h = torch.randn(B, L, D, requires_grad=True)
    E, b = torch.randn(V, D, requires_grad=True), torch.randn(V, requires_grad=True)
    keep = torch.arange(L) < torch.randint(L//2, L + 1, (B, 1))
    above = None                                                           # after the first step, as a gate's thresholds tell the decode: what is open is louder
    def decode(): return pooled_decode(h, E, b, keep, above=above) if path == 'tiled' else naive_decode(h, E, b, keep)
    def step():
        nonlocal above
        with torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'):
            z = decode()[0].float()
        if above is None: above = z.detach().topk(OPEN + 1).values.min().expand(V) if gradient == 'sparse' else torch.full((V,), -torch.inf)
        if gradient == 'sparse': z = torch.where(z > z.detach().topk(OPEN + 1).values[:, -1:], z, 0.)
        z.square().sum().backward()
        h.grad = E.grad = b.grad = None
    warm = torch.randn(512, 512); warm @ warm                              # load the matrix library before the baseline is read
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter(); step(); times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps(dict(dtype=dtype, gradient=gradient, path=path, seconds=statistics.median(times[1:]), peak_mib=peak/1024)))

if __name__ == '__main__': main(*sys.argv[1:])
