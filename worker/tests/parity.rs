//! takuma's iteration against PyTorch's: values stored by `bench/fixture.py`.
//!
//! PyTorch ran the iteration as its papers write it, in float64; takuma leaves out the wasted work and
//! fuses what it can, and must arrive at the same numbers.
#![allow(clippy::unwrap_used, reason = "what fails in a helper fails the test")]

use std::path::Path;

use safetensors::SafeTensors;
use takuma_core::config::{Recipe, RunConfig};
use takuma_worker::model::{Discriminator, Generator, Network, NormUpdates, Pass};
use takuma_worker::recipe::{Batch, Dcgan, DcganState, Phase, PhaseSums};
use takuma_worker::trainer::Exchange;
use tch::{Kind, Tensor};

const TOLERANCE: f64 = 1e-5;

struct Fixture(Vec<u8>);

impl Fixture {
    fn open() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/dcgan_tiny.safetensors");
        Self(std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    fn tensor(&self, name: &str) -> Tensor {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let view = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        let kind = match view.dtype() {
            safetensors::Dtype::F32 => Kind::Float,
            safetensors::Dtype::U8 => Kind::Uint8,
            safetensors::Dtype::I64 => Kind::Int64,
            other => panic!("{name} is {other:?}"),
        };
        let shape: Vec<i64> = view.shape().iter().map(|&side| side as i64).collect();
        Tensor::from_data_size(view.data(), &shape, kind)
    }

    fn number(&self, name: &str) -> f64 {
        self.tensor(name).to_kind(Kind::Double).double_value(&[0])
    }

    fn scalar(&self, name: &str) -> f64 {
        let tensor = self.tensor(name);
        if tensor.dim() == 0 { tensor.to_kind(Kind::Double).double_value(&[]) } else { self.number(name) }
    }

    /// The networks as the fixture starts them.
    fn state(&self, kind: Kind) -> DcganState {
        let mut state = DcganState::new(Recipe::DcganTiny, 0, kind);
        self.fill(&mut state.generator, "init.g");
        self.fill(&mut state.discriminator, "init.d");
        state
    }

    fn fill(&self, network: &mut impl Network, prefix: &str) {
        tch::no_grad(|| {
            for parameter in network.parameters() {
                let values = self.tensor(&format!("{prefix}.{}", parameter.name));
                assert_eq!(values.size(), parameter.tensor.size(), "{}", parameter.name);
                parameter.tensor.shallow_clone().copy_(&values);
            }
            for norm in network.norms_mut() {
                let [mean, var, _] = norm.buffers().map(|(name, _)| name);
                let values = [mean, var].map(|name| self.tensor(&format!("{prefix}.{name}")));
                let [mean, var] = values;
                norm.restore(&[mean, var, Tensor::from(0i64)]).unwrap();
            }
        });
    }

    fn batch(&self, kind: Kind) -> Batch {
        let reals = self.tensor("reals").to_kind(kind) / 127.5 - 1.0;
        let noise_nz = self.tensor("z").to_kind(kind);
        Batch { reals_nchw: reals.permute([0, 3, 1, 2]), noise_nz, fed: 0 }
    }
}

/// The largest difference, relative to values above 1.
fn difference(ours: &Tensor, theirs: &Tensor) -> f64 {
    let (ours, theirs) = (ours.to_kind(Kind::Double), theirs.to_kind(Kind::Double));
    assert_eq!(ours.size(), theirs.size());
    let scale = theirs.abs().clamp_min(1.0);
    ((ours - theirs).abs() / scale).max().double_value(&[])
}

fn iterate(net: &mut Dcgan, batch: &Batch) -> [PhaseSums; 3] {
    Phase::ALL.map(|phase| net.phase(batch, phase, &mut []).unwrap())
}

#[test]
fn forward_passes_equal_pytorch() {
    let fixture = Fixture::open();
    for kind in [Kind::Float, Kind::Double] {
        let state = fixture.state(kind);
        let batch = fixture.batch(kind);
        let pass = Pass { images_per_group: batch.noise_nz.size()[0], groups: 1, reducer: None };
        let mut updates = NormUpdates::default();
        let noise_nz = std::slice::from_ref(&batch.noise_nz);
        let fake = Generator::train(&[&state.generator], noise_nz, &pass, &mut updates).unwrap().remove(0);
        let logits = |images: &Tensor| {
            let (lanes, images) = ([&state.discriminator], std::slice::from_ref(images));
            let logits = Discriminator::train(&lanes, images, &pass, &mut NormUpdates::default());
            logits.unwrap()[0].detach()
        };
        for (name, ours) in [
            ("fwd.fake", fake.detach()),
            ("fwd.fake_eval", state.generator.infer(&batch.noise_nz)),
            ("fwd.logits_real", logits(&batch.reals_nchw)),
            ("fwd.logits_fake", logits(&fake.detach())),
        ] {
            let off = difference(&ours.reshape([-1]), &fixture.tensor(name).reshape([-1]));
            assert!(off < TOLERANCE, "{name} as {kind:?} is off by {off:e}");
        }
    }
}

#[test]
fn one_iteration_equals_pytorch() {
    let fixture = Fixture::open();
    let batch = fixture.batch(Kind::Double);
    let mut config = RunConfig::new(Recipe::DcganTiny, "file:///fixture");
    config.global_batch = batch.noise_nz.size()[0] as u32;
    let mut net = Dcgan::new(&config, fixture.state(Kind::Double), &Exchange::new());
    let sums = iterate(&mut net, &batch);
    for (name, ours) in [("loss.d", sums[0].loss), ("loss.g1", sums[1].loss), ("loss.g2", sums[2].loss)] {
        let theirs = fixture.scalar(name);
        assert!((ours - theirs).abs() < TOLERANCE, "{name} is {ours}, not {theirs}");
    }
    let d_acc = sums[0].right / (2.0 * f64::from(config.global_batch));
    assert!((d_acc - fixture.scalar("d_acc")).abs() < 1e-6);
    check_final(&fixture, &net.state().generator, "final.g");
    check_final(&fixture, &net.state().discriminator, "final.d");
}

fn check_final(fixture: &Fixture, network: &dyn Network, prefix: &str) {
    let parameters = network.parameters().into_iter().map(|p| (p.name.clone(), p.tensor.detach()));
    let buffers = network.norms().into_iter().flat_map(|norm| norm.buffers().into_iter().take(2));
    for (name, ours) in parameters.chain(buffers) {
        let off = difference(&ours, &fixture.tensor(&format!("{prefix}.{name}")));
        assert!(off < TOLERANCE, "{prefix}.{name} is off by {off:e}");
    }
}

#[test]
fn losses_in_float_equal_pytorch() {
    let fixture = Fixture::open();
    let batch = fixture.batch(Kind::Float);
    let mut config = RunConfig::new(Recipe::DcganTiny, "file:///fixture");
    config.global_batch = batch.noise_nz.size()[0] as u32;
    let mut net = Dcgan::new(&config, fixture.state(Kind::Float), &Exchange::new());
    let sums = iterate(&mut net, &batch);
    for (name, ours) in [("loss.d", sums[0].loss), ("loss.g1", sums[1].loss), ("loss.g2", sums[2].loss)] {
        let theirs = fixture.scalar(name);
        assert!((ours - theirs).abs() < TOLERANCE * theirs.abs().max(1.0), "{name} is {ours}, not {theirs}");
    }
}
