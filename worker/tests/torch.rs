//! The shim's functions on a processor.
#![allow(clippy::unwrap_used, reason = "what fails in a helper fails the test")]

use takuma_worker::torch::{self, AdamOptions, AdamTensors, BatchNormOptions, Guard, RunningStatistics};
use tch::{Device, Kind, Tensor};

const CPU_FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

fn values(shape: &[i64], seed: f64) -> Tensor {
    let len: i64 = shape.iter().product();
    ((Tensor::arange(len, (Kind::Double, Device::Cpu)) + seed) * 12.9898).sin().view(shape)
}

#[test]
fn statistics_are_mixed_group_after_group_as_tensor_operations_mix_them() {
    let (momentum, elements) = (0.1, 513.0);
    for kind in [Kind::Float, Kind::Double] {
        let batch = values(&[2, 2, 33], 5.0) + 1.5;
        let (mean, variance) = (values(&[33], 1.0).to_kind(kind), (values(&[33], 2.0) + 2.0).to_kind(kind));
        let (mut their_mean, mut their_variance) = (mean.copy(), variance.copy());
        for group in 0..2 {
            let mix = |running: &Tensor, new: Tensor| {
                (running.to_kind(Kind::Double) * (1.0 - momentum) + new * momentum).to_kind(kind)
            };
            their_mean = mix(&their_mean, batch.get(group).get(0));
            their_variance = mix(&their_variance, batch.get(group).get(1) * (elements / (elements - 1.0)));
        }
        let layer = RunningStatistics { mean: &mean, variance: &variance, batch: &batch, elements };
        torch::commit_statistics(&[layer], momentum, Some(&Tensor::from(0.0f32))).unwrap();
        assert!(mean.equal(&their_mean) && variance.equal(&their_variance));
        torch::commit_statistics(&[layer], momentum, Some(&Tensor::from(1.0f32))).unwrap();
        assert!(
            mean.equal(&their_mean) && variance.equal(&their_variance),
            "a refused update changes nothing"
        );
    }
}

#[test]
fn guard_judges_loss_gradients_and_what_was_refused_before() {
    let (one, two) = (values(&[100], 1.0), values(&[70], 2.0).to_kind(Kind::Float));
    let guard = Guard::new(Device::Cpu);
    let result = |guard: &Guard| {
        (guard.found.double_value(&[]), guard.index.int64_value(&[]), guard.frozen.double_value(&[]))
    };
    torch::guard(&[&one, &two], &Tensor::from(1.0f32), None, &guard, true).unwrap();
    assert_eq!(result(&guard), (0.0, 2, 0.0));
    drop(two.get(69).fill_(f64::INFINITY));
    torch::guard(&[&one, &two], &Tensor::from(1.0f32), None, &guard, false).unwrap();
    assert_eq!(result(&guard), (1.0, 1, 0.0));
    torch::guard(&[&one], &Tensor::from(f32::NAN), None, &guard, true).unwrap();
    assert_eq!(result(&guard), (1.0, 1, 1.0), "the loss has the index behind all gradients");
    torch::guard(&[&one], &Tensor::from(1.0f32), None, &guard, true).unwrap();
    assert_eq!(result(&guard), (1.0, 1, 1.0), "what was refused once freezes what follows");
    let error = torch::guard(&[&Tensor::from(1i64)], &Tensor::from(1.0f32), None, &guard, true).unwrap_err();
    assert!(error.message.contains("float, double or bfloat16"), "{error}");
}

#[test]
fn refused_adam_step_neither_updates_nor_counts() {
    let shapes = [vec![3, 5], vec![7]];
    let make = |seed: f64| -> Vec<Tensor> {
        shapes.iter().map(|shape| values(shape, seed).to_kind(Kind::Float)).collect()
    };
    let zeros = || -> Vec<Tensor> { shapes.iter().map(|shape| Tensor::zeros(shape, CPU_FLOAT)).collect() };
    let options = AdamOptions { learning_rate: 1e-2, beta1: 0.5, beta2: 0.999, eps: 1e-8 };
    let run = |verdicts: &[Option<f32>]| {
        let (params, averages, squares) = (make(1.0), zeros(), zeros());
        let steps: Vec<Tensor> = shapes.iter().map(|_| Tensor::zeros([], CPU_FLOAT)).collect();
        for verdict in verdicts {
            let found = verdict.map(Tensor::from);
            let refs = |list: &[Tensor]| -> Vec<Tensor> { list.iter().map(Tensor::shallow_clone).collect() };
            let lists = [refs(&params), make(2.0), refs(&averages), refs(&squares), refs(&steps)];
            let [params, grads, averages, squares, steps] =
                lists.each_ref().map(|list| list.iter().collect::<Vec<_>>());
            let tensors = AdamTensors {
                params: &params,
                grads: &grads,
                exp_avgs: &averages,
                exp_avg_sqs: &squares,
                steps: &steps,
                found_inf: found.as_ref(),
            };
            torch::fused_adam(&tensors, options).unwrap();
        }
        (params, steps)
    };
    let (plain, _) = run(&[None, None]);
    let (guarded, steps) = run(&[Some(0.0), Some(1.0), Some(0.0), Some(1.0)]);
    for (plain, guarded) in plain.iter().zip(&guarded) {
        assert!(plain.equal(guarded));
    }
    assert!(steps.iter().all(|step| step.double_value(&[]) == 2.0));
}

#[test]
fn gathered_pixels_are_those_of_the_feed() {
    let images = Tensor::arange(256 * 3, (Kind::Int64, Device::Cpu)).to_kind(Kind::Uint8).view([4, 8, 8, 3]);
    let rows = Tensor::from_slice(&[2i64, 0, 2]);
    let target = Tensor::zeros([3, 8, 8, 3], CPU_FLOAT).permute([0, 3, 1, 2]);
    torch::gather_images(&images, &rows, &target).unwrap();
    for (i, row) in [2, 0, 2].into_iter().enumerate() {
        let pixels = Vec::<u8>::try_from(images.get(row).view([-1])).unwrap();
        let expected: Vec<f32> = pixels.iter().map(|&pixel| f32::from(pixel) / 127.5 - 1.0).collect();
        let ours = target.get(i as i64).permute([1, 2, 0]).contiguous().view([-1]);
        assert_eq!(Vec::<f32>::try_from(ours).unwrap(), expected);
    }
    let error = torch::gather_images(&images, &Tensor::from_slice(&[4i64, 0, 0]), &target).unwrap_err();
    assert!(error.message.contains("image 4 of 4"), "{error}");
    let plain = Tensor::zeros([3, 3, 8, 8], CPU_FLOAT);
    assert!(torch::gather_images(&images, &rows, &plain).is_err(), "not channels_last");
}

#[test]
fn copy_converts_and_refuses_another_shape() {
    let target = Tensor::zeros([4], (Kind::BFloat16, Device::Cpu));
    torch::copy_async(&target, &Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0])).unwrap();
    assert_eq!(target.sum(Kind::Double).double_value(&[]), 10.0);
    assert!(torch::copy_async(&target, &Tensor::from(1.0f32)).is_err());
}

#[test]
fn batch_norm_of_bf16_rounds_once() {
    let x = values(&[4, 8, 5, 5], 3.0).to_kind(Kind::BFloat16);
    let (weight, bias) = (values(&[8], 1.0).to_kind(Kind::Float), values(&[8], 2.0).to_kind(Kind::Float));
    let options = BatchNormOptions { groups: 2, images_per_group: 2, eps: 1e-5, slope: 0.2, reducer: None };
    let run = |x: Tensor| {
        let leaves = [x, weight.copy(), bias.copy()].map(|tensor| tensor.set_requires_grad(true));
        let (y, stats) = torch::batch_norm(&leaves[0], &leaves[1], &leaves[2], &options).unwrap();
        let loss = (y.to_kind(Kind::Float) * values(&y.size(), 9.0).to_kind(Kind::BFloat16)).sum(Kind::Float);
        torch::backward(&loss, &leaves.each_ref()).unwrap();
        let [dx, dweight, dbias] = leaves.map(|leaf| leaf.grad());
        [y.detach(), stats, dx, dweight, dbias]
    };
    let narrow = run(x.copy());
    let wide = run(x.to_kind(Kind::Float));
    assert_eq!(narrow[0].kind(), Kind::BFloat16);
    assert_eq!(narrow[2].kind(), Kind::BFloat16);
    for (i, (narrow, wide)) in narrow.iter().zip(&wide).enumerate() {
        assert!(narrow.equal(&wide.to_kind(narrow.kind())), "result {i}");
    }
}
