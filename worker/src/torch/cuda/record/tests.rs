use super::*;

/// What was done, in order, with what failed on order.
#[derive(Debug, Default)]
struct Log {
    lines: Vec<String>,
    given: u32,
    is_running: bool,
    fails: Option<&'static str>,
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Log>>);

/// What was given to the device between two cuts; says when it goes.
struct Kept {
    name: String,
    log: Fake,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.log.line(format!("drop {}", self.name));
    }
}

impl Fake {
    fn line(&self, line: String) {
        self.0.lock().unwrap().lines.push(line);
    }

    /// Gives the device some work.
    fn give(&self) {
        self.0.lock().unwrap().given += 1;
    }

    fn take_lines(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().lines)
    }

    fn attempt(&self, what: &'static str) -> Result<(), TorchError> {
        if self.0.lock().unwrap().fails == Some(what) {
            return Err(TorchError { operation: what, message: "on order".to_owned() });
        }
        Ok(())
    }

    fn failing(what: &'static str) -> Self {
        let fake = Self::default();
        fake.0.lock().unwrap().fails = Some(what);
        fake
    }
}

impl Capture for Fake {
    type Graph = Kept;

    fn begin(&mut self) -> Result<(), TorchError> {
        self.attempt("begin")?;
        let mut log = self.0.lock().unwrap();
        assert!(!std::mem::replace(&mut log.is_running, true), "one capture at a time");
        log.given = 0;
        Ok(())
    }

    fn is_empty(&mut self) -> Result<bool, TorchError> {
        self.attempt("is_empty")?;
        Ok(self.0.lock().unwrap().given == 0)
    }

    fn end(&mut self) -> Result<Kept, TorchError> {
        let given = {
            let mut log = self.0.lock().unwrap();
            assert!(std::mem::replace(&mut log.is_running, false), "a capture is under way");
            log.given
        };
        self.attempt("end")?;
        Ok(Kept { name: format!("graph of {given}"), log: self.clone() })
    }

    fn abandon(&mut self) {
        if std::mem::replace(&mut self.0.lock().unwrap().is_running, false) {
            self.line("abandon".to_owned());
        }
    }
}

fn replayed(fake: &Fake, program: &mut Program<Kept, u32>) -> Vec<String> {
    let replayed: Result<(), ()> = program.replay(
        |graph| {
            fake.line(graph.name.clone());
            Ok(())
        },
        |sum| {
            fake.line(format!("sum {sum}"));
            Ok(())
        },
    );
    replayed.unwrap();
    fake.take_lines()
}

/// Two pieces of work, a sum, one piece, two sums at once, one piece.
fn body(fake: &Fake, recording: &Arc<dyn Recording<u32>>) -> Result<(), TorchError> {
    fake.give();
    fake.give();
    recording.sum(1)?;
    fake.give();
    // As libtorch's backward thread does.
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                recording.sum(2)?;
                recording.sum(3)
            })
            .join()
            .unwrap()
    })?;
    fake.give();
    Ok(())
}

#[test]
fn graphs_and_sums_are_replayed_in_the_order_in_which_they_were_recorded() {
    let fake = Fake::default();
    let mut program = record(fake.clone(), |recording| body(&fake, &recording)).unwrap();
    assert_eq!(program.counts(), (3, 3));
    let expected = ["graph of 2", "sum 1", "graph of 1", "sum 2", "sum 3", "graph of 1"];
    assert_eq!(replayed(&fake, &mut program), expected);
    assert_eq!(replayed(&fake, &mut program), expected, "and again");
    drop(program);
    assert_eq!(fake.take_lines(), ["drop graph of 1", "drop graph of 1", "drop graph of 2"]);
}

#[test]
fn program_without_sums_is_one_graph() {
    let fake = Fake::default();
    let mut program = record(fake.clone(), |_| {
        fake.give();
        Ok::<(), TorchError>(())
    })
    .unwrap();
    assert_eq!(replayed(&fake, &mut program), ["graph of 1"]);
}

#[test]
fn recording_that_fails_lets_the_device_go_and_keeps_nothing() {
    for what in ["is_empty", "end"] {
        let fake = Fake::failing(what);
        let mut again = None;
        let recorded = record(fake.clone(), |recording| {
            fake.give();
            let first = recording.sum(1).unwrap_err();
            // Backward may come to further sums before it ends.
            again = recording.sum(2).err();
            Err::<(), TorchError>(first)
        });
        assert_eq!(recorded.err().unwrap().operation, what);
        assert_eq!(again.unwrap().operation, what);
        assert!(!fake.0.lock().unwrap().is_running, "{what}");
    }
    let fake = Fake::failing("begin");
    let recorded = record::<_, u32, TorchError>(fake, |_| panic!("must not run"));
    assert_eq!(recorded.err().unwrap().operation, "begin");
}

#[test]
fn recording_whose_body_swallows_a_failure_fails() {
    let fake = Fake::default();
    let recorded = record(fake.clone(), |recording| {
        fake.give();
        recording.sum(1)?;
        fake.0.lock().unwrap().fails = Some("is_empty");
        drop(recording.sum(2));
        Ok::<(), TorchError>(())
    });
    assert_eq!(recorded.err().unwrap().operation, "is_empty");
    assert_eq!(fake.take_lines(), ["abandon", "drop graph of 1"]);
}

#[test]
fn body_that_fails_or_panics_leaves_no_capture_and_no_graph() {
    let fake = Fake::default();
    let failed = record(fake.clone(), |recording| {
        fake.give();
        recording.sum(1)?;
        Err::<(), TorchError>(TorchError { operation: "body", message: String::new() })
    });
    assert_eq!(failed.err().unwrap().operation, "body");
    assert_eq!(fake.take_lines(), ["abandon", "drop graph of 1"]);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        record::<_, u32, TorchError>(fake.clone(), |_| panic!("in the middle of a step")).map(drop)
    }));
    assert!(panicked.is_err());
    assert_eq!(fake.take_lines(), ["abandon"]);
}

#[test]
fn sum_after_the_end_is_refused() {
    let fake = Fake::default();
    let mut kept = None;
    let program = record(fake.clone(), |recording| {
        fake.give();
        kept = Some(recording);
        Ok::<(), TorchError>(())
    })
    .unwrap();
    let error = kept.unwrap().sum(1).unwrap_err();
    assert!(error.message.contains("has ended"), "{error}");
    assert_eq!(program.counts(), (1, 0));
}

#[test]
fn replay_ends_at_the_first_failure() {
    let fake = Fake::default();
    let mut program = record(fake.clone(), |recording| body(&fake, &recording)).unwrap();
    let mut launched = 0;
    let failed = program.replay(
        |_| {
            launched += 1;
            Ok(())
        },
        |&sum| if sum == 2 { Err("the group ended") } else { Ok(()) },
    );
    assert_eq!((failed, launched), (Err("the group ended"), 2));
}
