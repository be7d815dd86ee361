//! takuma's own kernels beside their CPU twins.

use takuma_worker::torch::cuda::Precision;
use takuma_worker::torch::{
    self, AdamOptions, AdamTensors, BatchNormOptions, Guard, RunningStatistics, batch_norm,
    commit_statistics, first_not_finite, fused_adam, gather_images,
};
use tch::{Device, Kind, Tensor};

use super::{gpu, row};

/// Largest difference over the largest value of `expected`.
pub fn off(found: &Tensor, expected: &Tensor) -> f64 {
    let (found, expected) = (
        found.to_device(Device::Cpu).to_kind(Kind::Double),
        expected.to_device(Device::Cpu).to_kind(Kind::Double),
    );
    let scale = expected.abs().max().double_value(&[]).max(1e-30);
    let off = (found - expected).abs().max().double_value(&[]) / scale;
    // A NaN passes no comparison, and must not pass for a small difference either.
    if off.is_nan() { f64::INFINITY } else { off }
}

fn images(size: [i64; 4], kind: Kind) -> Tensor {
    let [n, c, h, w] = size;
    Tensor::randn([n, h, w, c], (Kind::Float, Device::Cpu)).to_kind(kind).permute([0, 3, 1, 2])
}

/// y, statistics, and the gradients of x, weight and bias.
fn normalised(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    dy: &Tensor,
    groups: i64,
    slope: f64,
) -> [Tensor; 5] {
    let [x, weight, bias] = [x, weight, bias].map(|tensor| tensor.detach().copy().set_requires_grad(true));
    let options =
        BatchNormOptions { groups, images_per_group: x.size()[0] / groups, eps: 1e-5, slope, reducer: None };
    let (y, stats) = batch_norm(&x, &weight, &bias, &options).unwrap();
    let loss = (&y * dy).sum(Kind::Float);
    torch::backward(&loss, &[&x, &weight, &bias]).unwrap();
    [y.detach(), stats, x.grad(), weight.grad(), bias.grad()]
}

#[test]
fn batch_norm_agrees_with_the_processor() {
    let Some((device, _turn)) = gpu("batch norm", Precision::F32, true) else { return };
    tch::manual_seed(1);
    let mut worst: f64 = 0.0;
    for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 2e-2)] {
        for (n, c, side, groups) in
            [(128, 128, 16, 2), (64, 512, 4, 1), (64, 64, 32, 1), (6, 8, 8, 2), (5, 24, 3, 1), (2, 16, 64, 2)]
        {
            for slope in [1.0, 0.0, 0.2] {
                let x = images([n, c, side, side], kind);
                let dy = images([n, c, side, side], kind);
                let weight = Tensor::randn([c], (Kind::Float, Device::Cpu)) + 1.0;
                let bias = Tensor::randn([c], (Kind::Float, Device::Cpu));
                let expected = normalised(&x, &weight, &bias, &dy, groups, slope);
                let [x, weight, bias, dy] = [&x, &weight, &bias, &dy].map(|tensor| tensor.to_device(device));
                let found = normalised(&x, &weight, &bias, &dy, groups, slope);
                let again = normalised(&x, &weight, &bias, &dy, groups, slope);
                for (place, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    let off = off(found, expected);
                    assert!(
                        off < tolerance,
                        "{kind:?} [{n}, {c}, {side}] in {groups}, slope {slope}, {place}: {off}"
                    );
                    assert!(found.equal(&again[place]), "the same bits again");
                    if kind == Kind::Float {
                        worst = worst.max(off);
                    }
                }
            }
        }
    }
    row("batch norm, GPU beside CPU, f32", &format!("{worst:.1e} relative"));
}

#[test]
fn gathered_images_have_the_bits_of_the_processor() {
    let Some((device, _turn)) = gpu("gathered images", Precision::F32, true) else { return };
    let dataset = Tensor::randint(256, [37, 64, 64, 3], (Kind::Uint8, Device::Cpu));
    let rows = Tensor::from_slice(&[36i64, 0, 5, 5, 17]);
    for kind in [Kind::Float, Kind::BFloat16] {
        let target = |device| Tensor::zeros([5, 64, 64, 3], (kind, device)).permute([0, 3, 1, 2]);
        let (here, there) = (target(Device::Cpu), target(device));
        gather_images(&dataset, &rows, &here).unwrap();
        gather_images(&dataset.to_device(device), &rows.to_device(device), &there).unwrap();
        assert!(here.equal(&there.to_device(Device::Cpu)), "{kind:?}");
    }
}

#[test]
fn guard_finds_what_is_not_finite_and_its_place() {
    let Some((device, _turn)) = gpu("guard", Precision::F32, true) else { return };
    let tensors: Vec<Tensor> =
        [3i64, 1, 70_001, 512].iter().map(|&len| Tensor::randn([len], (Kind::Float, device))).collect();
    let gradients: Vec<&Tensor> = tensors.iter().collect();
    let loss = Tensor::from(1.0f32).to_device(device);
    let guard = Guard::new(device);
    let judged = |loss: &Tensor, sticky| {
        torch::guard(&gradients, loss, None, &guard, sticky).unwrap();
        (guard.found.double_value(&[]), guard.index.int64_value(&[]))
    };
    assert_eq!(judged(&loss, true), (0.0, 4));
    drop(tensors[2].get(70_000).fill_(f64::INFINITY));
    assert_eq!(first_not_finite(&gradients).unwrap(), Some(2));
    assert_eq!(judged(&loss, false), (1.0, 2));
    drop(tensors[2].get(70_000).fill_(0.0));
    assert_eq!(judged(&(&loss * f64::NAN), false), (1.0, 4));
    assert_eq!(judged(&loss, false), (0.0, 4));
    assert_eq!(judged(&(&loss * f64::NAN), true), (1.0, 4));
    assert_eq!(judged(&loss, true), (1.0, 4), "frozen");
}

#[test]
fn adam_and_running_statistics_agree_with_the_processor() {
    let Some((device, _turn)) = gpu("Adam and running statistics", Precision::F32, true) else { return };
    let options = AdamOptions { learning_rate: 2e-4, beta1: 0.5, beta2: 0.999, eps: 1e-8 };
    let made = |len: i64| Tensor::randn([len], (Kind::Float, Device::Cpu));
    let start: Vec<[Tensor; 2]> = [7i64, 40_000].iter().map(|&len| [made(len), made(len)]).collect();
    let stats = Tensor::rand([2, 2, 16], (Kind::Double, Device::Cpu));
    let after = |device: Device, found: f64| {
        let on = |tensor: &Tensor| tensor.to_device(device).copy();
        let params: Vec<_> = start.iter().map(|[param, _]| on(param)).collect();
        let grads: Vec<_> = start.iter().map(|[_, grad]| on(grad)).collect();
        let zeros: Vec<Vec<_>> = (0..2).map(|_| params.iter().map(Tensor::zeros_like).collect()).collect();
        let steps: Vec<_> = params.iter().map(|_| Tensor::zeros([], (Kind::Float, device))).collect();
        let found = Tensor::from(found as f32).to_device(device);
        let [p, g, m, v, s] =
            [&params, &grads, &zeros[0], &zeros[1], &steps].map(|list| list.iter().collect::<Vec<_>>());
        let tensors = AdamTensors {
            params: &p,
            grads: &g,
            exp_avgs: &m,
            exp_avg_sqs: &v,
            steps: &s,
            found_inf: Some(&found),
        };
        for _ in 0..3 {
            fused_adam(&tensors, options).unwrap();
        }
        let (mean, variance) =
            (on(&stats.get(0).get(0)).to_kind(Kind::Float), on(&stats.get(1).get(1)).to_kind(Kind::Float));
        let batch = on(&stats);
        let layer = RunningStatistics { mean: &mean, variance: &variance, batch: &batch, elements: 4096.0 };
        commit_statistics(&[layer], 0.1, Some(&found)).unwrap();
        let mut all = params;
        all.extend(steps);
        all.extend([mean, variance]);
        all
    };
    for found in [0.0, 1.0] {
        for (gpu, cpu) in after(device, found).iter().zip(after(Device::Cpu, found)) {
            assert!(off(gpu, &cpu) < 1e-6, "found {found}");
        }
    }
    let untouched = after(device, 1.0);
    assert!(untouched[1].equal(&start[1][0].to_device(device)) && untouched[2].double_value(&[]) == 0.0);
}
