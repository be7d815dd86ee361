//! takuma's CUDA kernels against the processor's functions, without a GPU: their text is compiled as C++
//! (`emulate.cpp`) and launched by the plans that launch it on a GPU.
#![allow(clippy::unwrap_used, reason = "what fails in a helper fails the test")]

use std::ffi::{CStr, CString};
use std::path::Path;

use emulation::{EmulatedLayer, EmulatedValues, Fenced, emulation, number, values};
use takuma_worker::torch::{self, Guard, RunningStatistics, Stamp, Vouch};
use tch::{Device, Kind, Tensor};

mod emulation;
mod norm;

/// A group's word and pair of stamps, or nothing.
type Group<'a> = Option<(&'a u32, &'a Tensor)>;

fn emulated_guard(gradients: &[&Tensor], loss: &Tensor, group: Group<'_>, guard: &Guard, sticky: bool) {
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
            group.map_or(std::ptr::null(), |(ended, _)| std::ptr::from_ref(ended)),
            group.map_or(std::ptr::null_mut(), |(_, pair)| pair.data_ptr()),
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
        let results = [
            (|gradients, loss, guard, sticky| emulated_guard(gradients, loss, None, guard, sticky))
                as fn(&[&Tensor], &Tensor, &Guard, bool),
            |gradients, loss, guard, sticky| torch::guard(gradients, loss, None, guard, sticky).unwrap(),
        ]
        .map(|judge| {
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
fn end_of_a_group_freezes_all_updates_behind_it_in_both_guards() {
    let gradient = values(&[100], 3, Kind::Float);
    let (fine, bad) = (Tensor::from(0.5f64), Tensor::from(f64::NAN));
    let stamp = Tensor::from(41.0f64);
    // Whether the own word is set when the rank signs and when it judges, and what the others' stamps make.
    let run = |words: [u32; 2], others: f64, loss: &Tensor, frozen: f64, sticky: bool| -> (f64, f64) {
        let results = [false, true].map(|is_emulated| {
            let guard = Guard::new(Device::Cpu);
            drop(guard.frozen.shallow_clone().fill_(frozen));
            let word = std::sync::atomic::AtomicU32::new(words[0]);
            // SAFETY: the word lives to the end of this block.
            let vouch = unsafe { Vouch::new(Device::Cpu, word.as_ptr()) };
            if is_emulated {
                // SAFETY: dense doubles and a word that live through the call.
                unsafe {
                    let pair = vouch.pair.data_ptr();
                    (emulation().vouch)(word.as_ptr(), stamp.data_ptr(), 3.0, 2.0, 4.0, pair);
                }
            } else {
                vouch.sign(&Stamp { number: &stamp, phases: 3, phase: 2, ranks: 4 }).unwrap();
            }
            let own = vouch.pair.double_value(&[0]);
            assert_eq!(own, if words[0] == 0 { 125.0 } else { 0.0 });
            assert_eq!(vouch.pair.double_value(&[1]), 500.0);
            drop(vouch.pair.get(0).fill_(own + others));
            word.store(words[1], std::sync::atomic::Ordering::SeqCst);
            if is_emulated {
                // SAFETY: as above.
                let word = unsafe { &*word.as_ptr() };
                emulated_guard(&[&gradient], loss, Some((word, &vouch.pair)), &guard, sticky);
            } else {
                torch::guard(&[&gradient], loss, Some(&vouch), &guard, sticky).unwrap();
            }
            (guard.found.double_value(&[]), guard.frozen.double_value(&[]))
        });
        assert_eq!(results[0], results[1]);
        results[0]
    };
    for sticky in [false, true] {
        assert_eq!(run([0, 0], 375.0, &fine, 0.0, sticky), (0.0, 0.0), "all signed");
        assert_eq!(run([0, 0], 250.0, &fine, 0.0, sticky), (1.0, 2.0), "one of the others did not");
        assert_eq!(run([0, 0], f64::NAN, &fine, 0.0, sticky), (1.0, 2.0), "nothing that is a stamp");
        assert_eq!(run([1, 1], 375.0, &fine, 0.0, sticky), (1.0, 2.0), "this one did not");
        assert_eq!(run([0, 1], 375.0, &fine, 0.0, sticky), (1.0, 2.0), "it ended in the last sum");
        assert_eq!(run([0, 0], 375.0, &fine, 2.0, sticky), (1.0, 2.0), "it ended before");
        assert_eq!(run([0, 1], 375.0, &bad, 1.0, sticky), (1.0, 2.0), "the end is told, not the NaN");
    }
    assert_eq!(run([0, 0], 375.0, &bad, 0.0, false), (1.0, 0.0));
    assert_eq!(run([0, 0], 375.0, &bad, 0.0, true), (1.0, 1.0));
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
