//! takuma's CUDA kernels against the processor's functions, without a GPU: their text is compiled as C++
//! (`emulate.cpp`) and launched by the plans that launch it on a GPU.
#![allow(clippy::unwrap_used, reason = "what fails in a helper fails the test")]

use std::ffi::{CStr, CString};
use std::path::Path;
use std::sync::Arc;

use emulation::{EmulatedLayer, EmulatedNorm, EmulatedValues, Fenced, emulation, number, values};
use takuma_worker::torch::{self, BatchNormOptions, Guard, NormLane, RunningStatistics, SumReducer};
use tch::{Device, Kind, Tensor};

mod emulation;

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

fn emulated_guard(gradients: &[&Tensor], loss: &Tensor, guard: &Guard, sticky: bool) {
    let describe = |tensor: &&Tensor| EmulatedValues {
        data: tensor.data_ptr(),
        elements: tensor.numel() as i64,
        kind: number(tensor.kind()),
    };
    let list: Vec<_> = gradients.iter().map(describe).collect();
    let emulation = emulation();
    // SAFETY: dense tensors that live through the call.
    unsafe {
        (emulation.guard)(
            list.as_ptr(),
            list.len() as i64,
            &describe(&loss),
            guard.frozen.data_ptr(),
            i32::from(sticky),
            guard.found.data_ptr(),
            guard.index.data_ptr(),
        );
    }
}

#[test]
fn guard_kernels_agree_with_the_processor() {
    let kinds = [Kind::Float, Kind::BFloat16, Kind::Double];
    // More than one launch's table; lengths with and without tails; the 5th is empty.
    let gradients: Vec<Tensor> = (0..61)
        .map(|i| {
            let kind = kinds[i % 3];
            let len = if i == 4 { 0 } else { 1 + (i as i64 * 37) % 211 };
            if i % 7 == 0 {
                values(&[len + 1], i as i64, kind).narrow(0, 1, len)
            } else {
                values(&[len], i as i64, kind)
            }
        })
        .collect();
    let list: Vec<&Tensor> = gradients.iter().collect();
    let run = |what: &str, loss: &Tensor, frozen: f64, sticky: bool| -> (f64, f64, i64) {
        let results = [emulated_guard, |gradients: &[&Tensor], loss: &Tensor, guard: &Guard, sticky| {
            torch::guard(gradients, loss, guard, sticky).unwrap();
        }]
        .map(|judge: fn(&[&Tensor], &Tensor, &Guard, bool)| {
            let guard = Guard::new(Device::Cpu);
            drop(guard.frozen.shallow_clone().fill_(frozen));
            judge(&list, loss, &guard, sticky);
            (guard.found.double_value(&[]), guard.frozen.double_value(&[]), guard.index.int64_value(&[]))
        });
        assert_eq!(results[0], results[1], "{what}");
        results[0]
    };
    let fine = Tensor::from(0.5f32);
    assert_eq!(run("nothing", &fine, 0.0, true), (0.0, 0.0, 61));
    assert_eq!(run("frozen", &fine, 1.0, true), (1.0, 1.0, 61));
    for (loss, kind) in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY].into_iter().zip(kinds) {
        let loss = Tensor::from(loss).to_kind(kind);
        assert_eq!(run("loss", &loss, 0.0, false), (1.0, 0.0, 61));
        assert_eq!(run("loss, sticky", &loss, 0.0, true), (1.0, 1.0, 61));
    }
    for i in (0..61).rev().step_by(4) {
        let len = gradients[i].numel() as i64;
        if len == 0 {
            continue;
        }
        let bad = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][i % 3];
        // First, last, and one in between.
        let place = [0, len - 1, len / 2][i / 3 % 3];
        let value = gradients[i].get(place).shallow_clone();
        let before = value.copy();
        drop(value.shallow_clone().fill_(bad));
        assert_eq!(run("a gradient", &fine, 0.0, true), (1.0, 1.0, i as i64));
        assert_eq!(torch::first_not_finite(&list).unwrap(), Some(i));
        if i % 5 != 0 {
            value.shallow_clone().copy_(&before);
        } else {
            // Later ones stay: the first is named.
            assert_eq!(run("two gradients", &fine, 0.0, false).2, i as i64);
        }
    }
}

#[test]
fn statistics_kernel_equals_the_processor_to_the_bit() {
    // More layers than one launch's table has.
    let shapes: Vec<(i64, i64, Kind)> = (0..29)
        .map(|i| {
            ([8, 64, 300, 1][i % 4], 1 + i as i64 % 2, if i % 5 == 0 { Kind::Double } else { Kind::Float })
        })
        .collect();
    let running = |seed| -> Vec<[Tensor; 2]> {
        let of = |(i, &(channels, _, kind)): (usize, &(i64, i64, Kind))| {
            [0i64, 1].map(|which| values(&[channels], seed + which + i as i64, kind) + which as f64 * 3.0)
        };
        shapes.iter().enumerate().map(of).collect()
    };
    let batch: Vec<Tensor> = (0..)
        .zip(&shapes)
        .map(|(i, &(channels, groups, _))| values(&[groups, 2, channels], 50 + i, Kind::Double) + 2.5)
        .collect();
    let elements = 4097.0;
    for found in [None, Some(0.0f32), Some(1.0f32)] {
        let found = found.map(Tensor::from);
        let (ours, theirs) = (running(7), running(7));
        let layers: Vec<_> = (0..shapes.len())
            .map(|i| EmulatedLayer {
                mean: ours[i][0].data_ptr(),
                variance: ours[i][1].data_ptr(),
                batch: batch[i].data_ptr(),
                unbiased: elements / (elements - 1.0),
                channels: shapes[i].0,
                groups: shapes[i].1,
                kind: number(shapes[i].2),
            })
            .collect();
        let pointer = found.as_ref().map_or(std::ptr::null_mut(), Tensor::data_ptr);
        let emulation = emulation();
        // SAFETY: dense tensors that live through the call.
        unsafe { (emulation.commit)(layers.as_ptr(), layers.len() as i64, 0.1, pointer) };
        let of = |i: usize| RunningStatistics {
            mean: &theirs[i][0],
            variance: &theirs[i][1],
            batch: &batch[i],
            elements,
        };
        let layers: Vec<_> = (0..shapes.len()).map(of).collect();
        torch::commit_statistics(&layers, 0.1, found.as_ref()).unwrap();
        for (ours, theirs) in ours.iter().flatten().zip(theirs.iter().flatten()) {
            assert!(ours.equal(theirs));
        }
    }
}

#[test]
fn gather_kernel_equals_the_processor_to_the_bit() {
    for (side, offset) in [(4, 0), (64, 0), (5, 0), (4, 1)] {
        let pixels = Tensor::arange(7 * side * side * 3, (Kind::Int64, Device::Cpu)) * 37;
        let images = pixels.to_kind(Kind::Uint8).view([7, side, side, 3]);
        let rows = Tensor::from_slice(&[3i64, 0, 6, 6]);
        for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
            let ours = Fenced::new(&[4, side, side, 3], offset, kind);
            let theirs = Fenced::new(&[4, side, side, 3], 0, kind);
            let emulation = emulation();
            // SAFETY: dense tensors that live through the call.
            unsafe {
                (emulation.gather)(
                    images.data_ptr(),
                    7,
                    side * side * 3,
                    rows.data_ptr(),
                    4,
                    ours.pointer(),
                    number(kind),
                );
            }
            torch::gather_images(&images, &rows, &theirs.tensor().permute([0, 3, 1, 2])).unwrap();
            ours.check("the target");
            assert!(ours.tensor().equal(&theirs.tensor()), "{kind:?}, side {side}, offset {offset}");
        }
    }
}

#[test]
fn kernels_compile_for_gpus_old_and_new() {
    let torch = Path::new(env!("CARGO_MANIFEST_DIR")).join("torch/cuda");
    let text = ["kernel_types.h", "numbers.cu", "batch_norm.cu", "images.cu", "update.cu"]
        .map(|file| std::fs::read_to_string(torch.join(file)).unwrap());
    let source = CString::new(text.concat()).unwrap();
    let folder = std::env::var("TAKUMA_CUDA_LIBRARIES")
        .or_else(|_| std::env::var("LIBTORCH").map(|libtorch| format!("{libtorch}/cuda")))
        .unwrap_or_default();
    let folder = CString::new(folder).unwrap();
    for architecture in [75, 90, 120] {
        let mut log = vec![0u8; 1 << 16];
        let emulation = emulation();
        // SAFETY: NUL-terminated strings, and a log of the size that is given.
        let result = unsafe {
            (emulation.compiled)(
                folder.as_ptr(),
                source.as_ptr(),
                architecture,
                log.as_mut_ptr().cast(),
                log.len(),
            )
        };
        let log = CStr::from_bytes_until_nul(&log).unwrap().to_string_lossy();
        if result == 2 {
            eprintln!("SKIPPED: the kernels were not compiled for a GPU: {log}");
            return;
        }
        assert_eq!(result, 0, "sm_{architecture}: {log}");
        let spilled =
            log.lines().any(|line| line.contains("spill") && !line.contains(" 0 bytes spill stores"));
        assert!(!spilled, "sm_{architecture} spills registers: {log}");
    }
}
