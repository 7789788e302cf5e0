//! Who has which page.

/// The number of a page.
pub type Page = u32;

/// All pages, with how many sequences have each.
#[derive(Debug)]
pub struct Pages {
    owners: Vec<u32>,
    /// Those that nobody has, the next to be taken last.
    free: Vec<Page>,
}

impl Pages {
    /// That many pages, all free.
    pub fn new(pages: u64) -> Pages {
        let pages = u32::try_from(pages).unwrap_or(u32::MAX);
        Pages { owners: vec![0; pages as usize], free: (0..pages).rev().collect() }
    }

    pub fn free(&self) -> u64 {
        self.free.len() as u64
    }

    /// The pages that nobody has.
    pub fn all_free(&self) -> Vec<Page> {
        self.free.clone()
    }

    /// A page for one sequence.
    pub fn take(&mut self) -> Option<Page> {
        let page = self.free.pop()?;
        self.owners[page as usize] = 1;
        Some(page)
    }

    /// One more sequence has the page.
    pub fn share(&mut self, page: Page) {
        self.owners[page as usize] += 1;
    }

    pub fn is_shared(&self, page: Page) -> bool {
        self.owners[page as usize] > 1
    }

    /// One sequence less has the page. Tells whether it is free now.
    pub fn release(&mut self, page: Page) -> bool {
        let owners = &mut self.owners[page as usize];
        *owners -= 1;
        if *owners == 0 {
            self.free.push(page);
        }
        *owners == 0
    }
}
