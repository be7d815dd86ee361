//! [`Grids`]: grids on their way to the store, several at once. One is drawn at a time, so that drawing takes one core at
//! most; a store that is far away takes several at a time.

use std::sync::Arc;

use bytes::Bytes;
use takuma_core::event::{Fence, Grid, GridKind};
use takuma_core::layout;
use takuma_store::Store;
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use super::persist::{Patience, persist};
use crate::drawing::Drawing;
use crate::samples;

/// Enough for 40 grids a second on a store that needs 100 ms for each.
const AT_ONCE: usize = 4;

/// What became of a grid.
#[derive(Debug)]
pub struct StoredGrid {
    /// As in the job.
    pub fence: Fence,
    /// As in the job.
    pub kind: GridKind,
    /// As in the job.
    pub step: u64,
    /// Height, width and the PNG, which lies in the store.
    pub outcome: Result<((u32, u32), Bytes), String>,
}

/// The grids under way. Those that are not through end with it.
#[derive(Debug)]
pub struct Grids {
    store: Store,
    patience: Patience,
    drawing: Drawing,
    turn: Arc<Mutex<()>>,
    under_way: JoinSet<StoredGrid>,
}

impl Grids {
    /// None yet, of the run whose folder this is.
    #[must_use]
    pub fn new(store: Store, patience: Patience, drawing: Drawing) -> Self {
        Self { store, patience, drawing, turn: Arc::default(), under_way: JoinSet::new() }
    }

    /// Whether one more may begin.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.under_way.len() < AT_ONCE
    }

    /// Whether none is under way.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.under_way.is_empty()
    }

    /// Begins with a grid.
    pub fn begin(&mut self, grid: Grid) {
        let (store, patience, drawing) = (self.store.clone(), self.patience.clone(), self.drawing);
        let turn = Arc::clone(&self.turn);
        self.under_way.spawn(async move {
            let (fence, kind, step) = (grid.fence.clone(), grid.kind, grid.step);
            let outcome = put(&store, &patience, drawing, &turn, grid).await;
            StoredGrid { fence, kind, step, outcome }
        });
    }

    /// The next one that is through; waits for ever while none is under way.
    pub async fn next(&mut self) -> StoredGrid {
        match self.under_way.join_next().await {
            Some(Ok(stored)) => stored,
            Some(Err(error)) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => std::future::pending().await,
            },
            None => std::future::pending().await,
        }
    }
}

async fn put(
    store: &Store,
    patience: &Patience,
    drawing: Drawing,
    turn: &Mutex<()>,
    grid: Grid,
) -> Result<((u32, u32), Bytes), String> {
    let object = match grid.kind {
        GridKind::Generated => layout::sample_file(grid.step),
        GridKind::Reals => layout::REALS_FILE.to_owned(),
    };
    let draw = move || {
        let picture = samples::stitch(&grid);
        // The pixels are not needed twice.
        drop(grid);
        let png = samples::png(&picture)?;
        Ok(((picture.height, picture.width), Bytes::from(png)))
    };
    let (size, png) = {
        let _drawing = turn.lock().await;
        drawing.draw(draw).await?
    };
    persist(patience, || store.put(&object, png.clone())).await?;
    Ok((size, png))
}
