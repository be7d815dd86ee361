//! Batch normalisation.

use std::ffi::CStr;
use std::sync::Arc;

use takuma_worker::torch::{self, BatchNormOptions, NormLane, SumReducer};
use tch::{Kind, Tensor};

use crate::emulation::{EmulatedNorm, Fenced, emulation, number, values};

/// So many workers with the same batch.
struct Times(i64);

impl SumReducer for Times {
    fn sum(&self, values: &mut [f64]) -> bool {
        values.iter_mut().for_each(|value| *value *= self.0 as f64);
        true
    }
}

#[derive(Debug, Clone, Copy)]
struct Case {
    kind: Kind,
    /// Tensors of `images` each; several are always exchanged.
    lanes: i64,
    images: i64,
    side: i64,
    channels: i64,
    groups: i64,
    slope: f64,
    /// Workers that have this batch; one exchanges nothing.
    workers: i64,
    /// Elements by which the tensors are off their alignment.
    offset: i64,
}

/// Largest difference, relative to values above 1.
fn difference(ours: &Tensor, theirs: &Tensor) -> f64 {
    let (ours, theirs) = (ours.to_kind(Kind::Double), theirs.to_kind(Kind::Double));
    assert_eq!(ours.size(), theirs.size());
    ((ours - &theirs).abs() / theirs.abs().clamp_min(1.0)).max().double_value(&[])
}

/// What batch normalisation made, channels last, lane after lane.
struct Results {
    y: Tensor,
    stats: Tensor,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
}

impl Case {
    /// The type of sums, weights and biases.
    fn wide(&self) -> Kind {
        if self.kind == Kind::Double { Kind::Double } else { Kind::Float }
    }

    fn is_exchanged(&self) -> bool {
        self.workers > 1
    }

    fn shape_nhwc(&self) -> [i64; 4] {
        [self.images, self.side, self.side, self.channels]
    }

    fn weight_and_bias(&self) -> [Tensor; 2] {
        let of = |seed| values(&[self.channels], seed, self.wide());
        [of(3) * 0.2 + 1.0, of(4) * 0.3]
    }

    /// By the emulated kernels. `x` and `dy` are by lane.
    fn emulate(&self, x: &[Fenced], dy: &[Fenced]) -> Results {
        let [weight, bias] = self.weight_and_bias();
        let by_lane = |shape: &[i64], offset, kind| -> Vec<Fenced> {
            (0..self.lanes).map(|_| Fenced::new(shape, offset, kind)).collect()
        };
        let image = || by_lane(&self.shape_nhwc(), self.offset, self.kind);
        let parameter = || by_lane(&[self.channels], 0, self.wide());
        let made = [image(), image(), parameter(), parameter()];
        let stats = Fenced::new(&[self.groups, 2, self.channels], 0, Kind::Double);
        let rows = self.images * self.side * self.side / self.groups;
        let pointers = |lanes: &[Fenced]| lanes.iter().map(Fenced::pointer).collect::<Vec<_>>();
        let [y, dx, dweight, dbias] = made.each_ref().map(|lanes| pointers(lanes));
        let (x, dy) = (pointers(x), pointers(dy));
        let norm = EmulatedNorm {
            kind: number(self.kind),
            rows,
            channels: self.channels,
            groups: self.groups,
            lanes: self.lanes,
            count: (rows * self.lanes * self.workers) as f64,
            eps: 1e-5,
            slope: self.slope,
            weight: weight.data_ptr(),
            bias: bias.data_ptr(),
            sum_factor: if self.is_exchanged() { self.workers as f64 } else { 0.0 },
            stats: stats.pointer(),
            x: x.as_ptr(),
            dy: dy.as_ptr(),
            y: y.as_ptr(),
            dx: dx.as_ptr(),
            dweight: dweight.as_ptr(),
            dbias: dbias.as_ptr(),
        };
        // SAFETY: dense memory of the sizes that the numbers say, alive until the end of this function.
        unsafe { (emulation().norm)(&norm) };
        let [y, dx, dweight, dbias] = made.map(|lanes| {
            lanes.iter().for_each(|lane| lane.check(&format!("{self:?}")));
            Tensor::cat(&lanes.iter().map(Fenced::tensor).collect::<Vec<_>>(), 0)
        });
        stats.check(&format!("{self:?}"));
        Results { y, stats: stats.tensor(), dx, dweight, dbias }
    }

    /// By the processor's functions.
    fn compute(&self, x: &[Tensor], dy: &[Tensor]) -> Results {
        let options = BatchNormOptions {
            groups: self.groups,
            images_per_group: self.images / self.groups * self.lanes * self.workers,
            eps: 1e-5,
            slope: self.slope,
            reducer: self.is_exchanged().then(|| Arc::new(Times(self.workers)) as Arc<dyn SumReducer>),
        };
        let [weight, bias] = self.weight_and_bias();
        let leaf = |tensor: &Tensor| tensor.detach().set_requires_grad(true);
        let leaves: Vec<[Tensor; 3]> =
            x.iter().map(|x| [leaf(&x.permute([0, 3, 1, 2])), leaf(&weight), leaf(&bias)]).collect();
        let lanes: Vec<NormLane<'_>> =
            leaves.iter().map(|[x, weight, bias]| NormLane { x, weight, bias }).collect();
        let (y, stats) = torch::batch_norm_lanes(&lanes, &options).unwrap();
        let losses: Vec<Tensor> = y
            .iter()
            .zip(dy)
            .map(|(y, dy)| (y * dy.permute([0, 3, 1, 2])).to_kind(Kind::Double).sum(Kind::Double))
            .collect();
        let inputs: Vec<&Tensor> = leaves.iter().flatten().collect();
        torch::backward(&Tensor::stack(&losses, 0).sum(Kind::Double), &inputs).unwrap();
        let joined = |tensors: Vec<Tensor>| Tensor::cat(&tensors, 0);
        let gradient = |place: usize| leaves.iter().map(|leaves| leaves[place].grad()).collect();
        Results {
            y: nchw_to_nhwc(&joined(y.iter().map(Tensor::detach).collect())),
            stats,
            dx: nchw_to_nhwc(&joined(gradient(0))),
            dweight: joined(gradient(1)),
            dbias: joined(gradient(2)),
        }
    }
}

/// Batch normalisation and its gradients both ways.
fn compare_norm(case: Case) {
    let image = |seed| Fenced::of(&(values(&case.shape_nhwc(), seed, case.kind) * 1.5 + 0.25), case.offset);
    let images = |seed| -> Vec<Fenced> { (0..case.lanes).map(|lane| image(seed + 10 * lane)).collect() };
    let tensors = |lanes: &[Fenced]| -> Vec<Tensor> { lanes.iter().map(Fenced::tensor).collect() };
    let (x, dy) = (images(1), images(2));
    let ours = case.emulate(&x, &dy);
    let theirs = case.compute(&tensors(&x), &tensors(&dy));
    // One rounding of the result apart, and of the sums: their number of terms is in it.
    let (element, sum) = match case.kind {
        Kind::Double => (1e-12, 1e-11),
        Kind::Float => (5e-6, 2e-5),
        _ => (1.0 / 128.0, 1e-4),
    };
    let statistic = if case.kind == Kind::Double { 1e-12 } else { 2e-6 };
    for (name, ours, theirs, tolerance) in [
        ("y", &ours.y, &theirs.y, element),
        ("stats", &ours.stats, &theirs.stats, statistic),
        ("dx", &ours.dx, &theirs.dx, element),
        ("dweight", &ours.dweight, &theirs.dweight, sum),
        ("dbias", &ours.dbias, &theirs.dbias, sum),
    ] {
        let off = difference(ours, theirs);
        assert!(off <= tolerance, "{name} is off by {off:e} in {case:?}");
    }
}

fn nchw_to_nhwc(tensor: &Tensor) -> Tensor {
    tensor.permute([0, 2, 3, 1]).contiguous()
}

#[test]
fn batch_norm_kernels_agree_with_the_processor() {
    let base = Case {
        kind: Kind::Float,
        lanes: 1,
        images: 4,
        side: 4,
        channels: 8,
        groups: 1,
        slope: 0.2,
        workers: 1,
        offset: 0,
    };
    for kind in [Kind::Float, Kind::BFloat16, Kind::Double] {
        for channels in [1, 3, 8, 12, 16, 24, 64, 96, 264, 512] {
            for (images, side, groups) in [(4, 4, 1), (6, 5, 2), (16, 1, 2), (34, 3, 2)] {
                let workers = if side == 5 { 2 } else { 1 };
                compare_norm(Case { kind, channels, images, side, groups, workers, ..base });
            }
        }
        // Many blocks; off its alignment; other activations.
        compare_norm(Case { kind, images: 16, side: 32, groups: 2, ..base });
        compare_norm(Case { kind, images: 2, side: 16, channels: 64, offset: 1, ..base });
        compare_norm(Case { kind, images: 4, side: 16, channels: 16, slope: 0.0, workers: 2, ..base });
        compare_norm(Case { kind, images: 4, side: 8, channels: 24, slope: 1.0, groups: 2, ..base });
        for (lanes, groups) in [(2, 2), (3, 1), (8, 2)] {
            compare_norm(Case { kind, lanes, groups, workers: 2, ..base });
            compare_norm(Case { kind, lanes, groups, workers: 2, side: 16, channels: 64, ..base });
        }
    }
    // SAFETY: a string of the library's that lives until the next call.
    let used = unsafe {
        let emulation = emulation();
        CStr::from_ptr((emulation.kernels)()).to_str().unwrap().to_owned()
    };
    for kernel in ["moments", "normalize", "gradient_sums", "gradient"] {
        for instance in ["f32_1", "f32_4", "f64_1", "f64_2", "bf16_1", "bf16_8"] {
            let name = format!("takuma_{kernel}_{instance}");
            assert!(used.lines().any(|line| line == name), "{name} was not tried");
        }
    }
}

#[test]
fn number_of_lanes_changes_no_bit_of_a_lane() {
    for (images, side, channels) in [(8, 32, 64), (8, 4, 512), (3, 5, 12)] {
        let kind = Kind::Float;
        let of = |lanes, workers| {
            let case =
                Case { kind, lanes, images, side, channels, groups: 1, slope: 0.2, workers, offset: 0 };
            let same = |seed| -> Vec<Fenced> {
                (0..lanes).map(|_| Fenced::of(&values(&case.shape_nhwc(), seed, kind), 0)).collect()
            };
            case.emulate(&same(1), &same(2))
        };
        // Twice a number, twice, is four times that number, to the bit.
        let (one, two) = (of(1, 4), of(2, 2));
        assert!(one.stats.equal(&two.stats));
        for lane in 0..2 {
            for (one, two) in [(&one.y, &two.y), (&one.dx, &two.dx)] {
                assert!(one.equal(&two.narrow(0, lane * images, images)), "lane {lane} of {images} images");
            }
            for (one, two) in [(&one.dweight, &two.dweight), (&one.dbias, &two.dbias)] {
                assert!(one.equal(&two.narrow(0, lane * channels, channels)), "lane {lane}'s parameters");
            }
        }
    }
}
