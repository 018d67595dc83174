"Time and peak memory of one tagging step (backbone left out), in a process of its own; prints one JSON line.  bench_tagging.py naive|recomputed|pairs [float32|bfloat16]"
import json, resource, statistics, sys, time

import torch
from lexical_sae.activation import JumpReLU
from lexical_sae.decode import streamed_linear
from lexical_sae.pairs import streamed_pairs

B, L, D, V, H, C, WORDS, REPEATS = 32, 128, 384, 30522, 256, 9, 100, 3

def first_layer(path, gate, rows, E, b, W):
    "What the head's first layer sees of every position; [N,H]."
    if path == 'pairs': return streamed_pairs(rows, E, b, gate).linear(W, None)
    if path == 'recomputed': return streamed_linear(rows, E, b, gate, W, None)
    with torch.autocast('cpu', enabled=False): return gate((rows @ E.T + b).float()) @ W.T          # [N,V] stored

def main(path, dtype='float32'):
    torch.manual_seed(0)
    rows = torch.randn(B*L, D, requires_grad=True)
    E, b = torch.randn(V, D, requires_grad=True), torch.zeros(V, requires_grad=True)
    W, W2 = torch.randn(H, V, requires_grad=True), torch.randn(C, H, requires_grad=True)
    spread = D**.5
    gate = JumpReLU(V, threshold=spread*torch.distributions.Normal(0., 1.).icdf(torch.tensor(1 - WORDS/V)).item(), spread=spread)
    labels = torch.randint(0, C, (B*L,))
    leaves = [rows, E, b, W, W2, gate.log_theta]
    def step():
        with torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'): u = first_layer(path, gate, rows, E, b, W)
        loss = torch.nn.functional.cross_entropy(u.relu() @ W2.T/u.detach().std(), labels)
        grads = torch.autograd.grad(loss, leaves)
        return loss.item(), [g.norm().item() for g in grads]
    warm = torch.randn(512, 512); warm @ warm                              # load the matrix library before the baseline is read
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter(); loss, norms = step(); times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps(dict(path=path, dtype=dtype, seconds=round(statistics.median(times[1:]), 2), peak_mib=round(peak/1024), loss=round(loss, 4),
                          gradient_norms=[float(f'{n:.4g}') for n in norms])))

if __name__ == '__main__': main(*sys.argv[1:])
